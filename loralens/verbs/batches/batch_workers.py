"""Processes that work on the adapters of a batch, each on one at a time.

They are processes and not threads, because a thread cannot be stopped: after Ctrl-C a run would go on until every
adapter in work is finished. They are started as commands and not by `multiprocessing`, whose processes import the
script of the caller again, which then has to guard its calls by ``if __name__ == "__main__"``.

A worker ends when its standard input ends, also if the process that started it was killed. It then cleans up as after
Ctrl-C, so that no part of an output stays behind.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Condition, Event, Thread
from typing import final

from loralens.core.threads import share_processors
from loralens.verbs.batches.batch_task import BatchTask, Outcome, failed, perform

GRACE = 10.0  # seconds in which a worker that was stopped may clean up; then it is killed
_CODE = "from loralens.verbs.batches.batch_workers import serve; serve()"
# BLAS reads these when NumPy is imported: modules are worked on in threads of our own, and in several processes.
_BLAS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def perform_all(tasks: Sequence[BatchTask], jobs: int) -> Generator[tuple[BatchTask, Outcome], None, None]:
    """Perform tasks, and give each with its outcome when it is finished.

    A task waits for those whose targets hold its own, since a folder is written as a whole. With one job, or if a task
    is not plain data (an adapter in memory may not be), the tasks are performed in this process.

    Parameters
    ----------
    tasks : sequence of BatchTask
    jobs : int
        How many tasks are performed at once.
    """
    jobs = min(jobs, len(tasks))
    if jobs < 2 or not sys.executable or not all(map(_can_be_sent, tasks)):
        for task in tasks:
            yield task, perform(task)
        return
    pending, outcomes = PendingTasks(tasks), SimpleQueue[tuple[BatchTask, Outcome]]()
    workers = [_Worker(jobs) for _ in range(jobs)]
    threads = [Thread(target=_feed, args=(worker, pending, outcomes), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for _ in tasks:
            yield outcomes.get()
    finally:  # also after Ctrl-C, and if the caller does not want more
        pending.close()
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.wait()
        # Each of them sees that its worker has ended.
        for thread in threads:
            if thread.is_alive():
                thread.join()
        for worker in workers:
            worker.close()


def _can_be_sent(task: BatchTask) -> bool:
    try:
        pickle.dumps(task)
    except Exception:  # noqa: BLE001  # what an object in memory raises is not known
        return False
    return True


def _feed(worker: "_Worker", pending: "PendingTasks", outcomes: "SimpleQueue[tuple[BatchTask, Outcome]]") -> None:
    """Give a worker one task after the other."""
    while (task := pending.take()) is not None:
        outcome = worker.perform(task)
        pending.finish(task)
        outcomes.put((task, outcome))


@final
class PendingTasks:
    """Tasks that no worker has taken yet, and those that are not finished."""

    def __init__(self, tasks: Sequence[BatchTask]) -> None:
        self._waiting, self._unfinished = list(tasks), list(tasks)
        self._changed = Condition()

    def take(self) -> BatchTask | None:
        """The next task whose target lies in none that is unfinished; None if there is no more."""
        with self._changed:
            while self._waiting:
                # An outermost target waits for none, so one worker at least can always go on.
                if task := next((each for each in self._waiting if self._is_free(each)), None):
                    self._waiting.remove(task)
                    return task
                self._changed.wait()
            return None

    def _is_free(self, task: BatchTask) -> bool:
        if task.target is None:
            return True
        holders = {*map(str, task.target.parents)}
        return not any(other.row.target in holders for other in self._unfinished)

    def finish(self, task: BatchTask) -> None:
        """Let the tasks go on that waited for this one."""
        with self._changed:
            self._unfinished.remove(task)
            self._changed.notify_all()

    def close(self) -> None:
        """Give no more tasks."""
        with self._changed:
            self._waiting.clear()
            self._changed.notify_all()


@final
class _Worker:
    """A process that performs tasks; another one takes its place if it ends, as for lack of memory."""

    def __init__(self, jobs: int) -> None:
        self._jobs, self._stopped = jobs, False
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        environment = dict(os.environ)
        for name in _BLAS:
            environment.setdefault(name, "1")
        # The same packages as here, also those of a folder that the caller has put into the path.
        environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        return subprocess.Popen(  # noqa: S603  # none of the words comes from outside
            # -P: the current folder is not searched for modules, unless it is in the path of the caller.
            [sys.executable, "-P", "-c", _CODE, str(self._jobs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            # Ctrl-C in a terminal goes to all processes of its group. Here only the first one decides what to stop.
            start_new_session=True,
        )

    def perform(self, task: BatchTask) -> Outcome:
        """Send a task and wait for its outcome."""
        process = self._process
        assert process.stdin
        assert process.stdout
        try:
            pickle.dump(task, process.stdin)
            process.stdin.flush()
            outcome = pickle.load(process.stdout)  # noqa: S301  # a process that this one has started
            assert isinstance(outcome, Outcome)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            code = process.wait()
            if not self._stopped:
                self.close()
                self._process = self._start()
            ended = f"signal {-code}" if code < 0 else f"exit code {code}"
            what = f"the process that worked on it has ended ({ended})"
            return failed(task, what, "give fewer --jobs if memory is short; else report this as a bug")
        return outcome

    def stop(self) -> None:
        """Let the process clean up and end."""
        self._stopped = True
        with suppress(OSError, ValueError):
            assert self._process.stdin
            self._process.stdin.close()

    def wait(self) -> None:
        """Wait until the process has ended after `stop`."""
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Close the pipes to a process that has ended."""
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what could not be sent is lost with the process
                if stream:
                    stream.close()


def serve() -> None:
    """Perform the tasks that come through standard input; the work of a process that `_Worker` has started."""
    share_processors(int(sys.argv[1]))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt, so that everything cleans up
    # Nothing that is printed may get between the outcomes.
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    tasks, busy = SimpleQueue[BatchTask | None](), Event()

    def listen() -> None:
        with suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                task = pickle.load(sys.stdin.buffer)  # noqa: S301  # from the process that has started this one
                busy.set()
                tasks.put(task)
        tasks.put(None)
        # In a thread nothing can be stopped, but a signal stops the main thread.
        if busy.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=listen, daemon=True).start()
    with suppress(KeyboardInterrupt, BrokenPipeError):
        while (task := tasks.get()) is not None:
            outcome = perform(task)
            # Before the outcome is sent: its receiver may end this process at once, which is not an interruption.
            busy.clear()
            pickle.dump(outcome, channel)
            channel.flush()
    # Nothing is left to do, and the thread that listens may still wait.
    os._exit(0)
