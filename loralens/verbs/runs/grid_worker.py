"""A process that performs one task after the other, and sends messages meanwhile.

It is a process and not a thread, because a thread cannot be stopped: after Ctrl-C a run would go on until every task in
work is finished. It is started as a command and not by `multiprocessing`, whose processes import the script of the
caller again, which then has to guard its calls by ``if __name__ == "__main__"``.

A worker ends when its standard input ends, also if the process that started it was killed. It then cleans up as after
Ctrl-C, so that no part of an output stays behind.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, NamedTuple, Protocol, final

from loralens.core.threads import share_processors

GRACE = 10.0  # seconds in which a worker that was stopped may clean up; then it is killed
# BLAS reads these when NumPy is imported: modules are worked on in threads of our own, and in several processes.
_BLAS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


class WorkerEnd(NamedTuple):
    """The outcome of a task whose worker has ended, for example for lack of memory."""

    code: int

    def __str__(self) -> str:
        return f"signal {-self.code}" if self.code < 0 else f"exit code {self.code}"


class WorkerMessage(NamedTuple):
    """A message of a worker: the number of its level in `logging`, and its text."""

    level: int
    text: str


@final
class Worker:
    """A process that performs tasks; another one takes its place if it ends.

    Parameters
    ----------
    serve : str
        The function that the process runs, as ``module:function``. It calls `serve_tasks`.
    sharers : int
        How many workers share the processors.
    on_message : callable, optional
        Called with every `WorkerMessage` while a task is performed.
    environment : mapping, optional
        Further variables for the process.
    grace : float
        Seconds in which a worker that was stopped may clean up.
    """

    def __init__(
        self,
        serve: str,
        sharers: int,
        *,
        on_message: Callable[[WorkerMessage], None] | None = None,
        environment: Mapping[str, str] | None = None,
        grace: float = GRACE,
    ) -> None:
        module, _, function = serve.partition(":")
        self._code = f"from {module} import {function}; {function}()"
        self._sharers, self._on_message, self._grace = sharers, on_message, grace
        self._environment = environment or {}
        self._stopped = False
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        environment = {**os.environ, **self._environment}
        for name in _BLAS:
            environment.setdefault(name, "1")
        # The process finds the same packages as this one, also those in a folder that the caller has put into the path.
        environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        return subprocess.Popen(  # noqa: S603  # none of the words comes from outside
            # -P: the current folder is not searched for modules, unless it is in the path of the caller.
            [sys.executable, "-P", "-c", self._code, str(self._sharers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            # Ctrl-C in a terminal goes to all processes of its group. Here only the first one decides what to stop.
            start_new_session=True,
        )

    def perform(self, task: Any) -> Any:
        """Send a task and wait for its outcome, which is `WorkerEnd` if the process ends."""
        process = self._process
        assert process.stdin
        assert process.stdout
        try:
            pickle.dump(task, process.stdin)
            process.stdin.flush()
            while True:
                answer = pickle.load(process.stdout)  # noqa: S301  # a process that this one has started
                if not isinstance(answer, WorkerMessage):
                    return answer
                if self._on_message:
                    self._on_message(answer)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            code = process.wait()
            if not self._stopped:
                self.close()
                self._process = self._start()
            return WorkerEnd(code)

    def stop(self) -> None:
        """Let the process clean up and end."""
        self._stopped = True
        with suppress(OSError, ValueError):
            assert self._process.stdin
            self._process.stdin.close()

    def wait(self) -> None:
        """Wait until the process has ended after `stop`."""
        try:
            self._process.wait(self._grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Close the pipes to a process that has ended."""
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what could not be sent is lost with the process
                if stream:
                    stream.close()


class Pending(Protocol):
    """Tasks that no worker has taken yet."""

    def take(self, worker: int) -> Any | None:
        """A task for the worker of this number; None if no task is left."""

    def finish(self, task: Any) -> None:
        """Note that a task is finished."""

    def close(self) -> None:
        """Give no more tasks."""


def perform_in(workers: Sequence[Worker], pending: Pending, count: int) -> Generator[tuple[Any, Any], None, None]:
    """Perform ``count`` tasks in workers, and give each with its outcome when it is finished."""
    outcomes = SimpleQueue[tuple[Any, Any]]()

    def feed(number: int) -> None:
        while (task := pending.take(number)) is not None:
            outcome = workers[number].perform(task)
            pending.finish(task)
            outcomes.put((task, outcome))

    threads = [Thread(target=feed, args=(number,), daemon=True) for number in range(len(workers))]
    try:
        for thread in threads:
            thread.start()
        for _ in range(count):
            yield outcomes.get()
    finally:  # also after Ctrl-C, and if the caller does not want more
        pending.close()
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.wait()
        # A thread ends when it sees that its worker has ended.
        for thread in threads:
            if thread.is_alive():
                thread.join()
        for worker in workers:
            worker.close()


def can_be_sent(task: Any) -> bool:
    """Whether a task is plain data, which another process can receive."""
    try:
        pickle.dumps(task)
    # An object of the caller may raise anything while it is pickled.
    except Exception:  # noqa: BLE001
        return False
    return True


def serve_tasks(perform: Callable[[Any, Callable[[WorkerMessage], None]], Any]) -> None:
    """Perform the tasks that come through standard input: the work of a process that `Worker` has started.

    Parameters
    ----------
    perform : callable
        Takes a task, and a function that sends messages, and returns the outcome.
    """
    share_processors(int(sys.argv[1]))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt, so that everything cleans up
    # Nothing that is printed may get between the outcomes.
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    tasks, busy = SimpleQueue[Any](), Event()

    def send(answer: Any) -> None:
        pickle.dump(answer, channel)
        channel.flush()

    def listen() -> None:
        try:
            while True:
                task = pickle.load(sys.stdin.buffer)  # noqa: S301  # from the process that has started this one
                busy.set()
                tasks.put(task)
        except (EOFError, OSError, pickle.UnpicklingError):
            tasks.put(None)
        # A task whose classes this process cannot import may raise anything. The first process then sees that this one
        # has ended.
        except Exception as error:  # noqa: BLE001
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)  # noqa: T201
            os._exit(1)
        # In a thread nothing can be stopped, but a signal stops the main thread.
        if busy.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=listen, daemon=True).start()
    with suppress(KeyboardInterrupt, BrokenPipeError):
        while (task := tasks.get()) is not None:
            outcome = perform(task, send)
            # Cleared before the outcome is sent: the process that receives the outcome may end this one at once, and
            # that is not an interruption.
            busy.clear()
            send(outcome)
    # Nothing is left to do, and the thread that listens may still wait.
    os._exit(0)
