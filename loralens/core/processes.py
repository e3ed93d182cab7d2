"""Worker processes: how they start, get their tasks, and end with the process that started them."""

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from importlib import import_module
from logging import Handler, LogRecord
from logging.handlers import QueueHandler, QueueListener
from queue import Empty
from threading import Thread
from time import monotonic
from typing import Any, TypeVar

from loralens.core.messages import LEVELS, LOGGER
from loralens.errors import OptionError

Task = TypeVar("Task")

# BLAS reads these when NumPy is imported, which `_begin` precedes.
_BLAS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
_SPAWN = multiprocessing.get_context("spawn")
START_LIMIT = 120.0  # seconds in which the first worker has to answer


class ProcessKilled(Exception):  # noqa: N818  # an outcome, not an error of ours
    """The outcome of a task whose process was killed, for example for lack of memory."""


def process_pool(workers: int, *, needed: str = "", messages: Any = None) -> ProcessPoolExecutor:
    """A pool of processes that end when this process does, however it ends.

    Each imports the module ``needed`` first. What it logs goes into ``messages``, if that is a queue.
    """
    # Processes that are forked would hold locks open after this process was killed.
    return ProcessPoolExecutor(workers, mp_context=_SPAWN, initializer=_begin, initargs=(needed, messages))


def _begin(needed: str, messages: Any) -> None:
    """Prepare a worker: one thread of BLAS, no answer to Ctrl-C, an end with the process that started it."""
    for name in _BLAS:
        os.environ.setdefault(name, "1")
    # Ctrl-C in a terminal goes to all processes of its group. The one that started the workers decides what to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _interrupt)
    Thread(target=_end_with_parent, daemon=True).start()
    if messages is not None:
        messages.cancel_join_thread()  # a process that was killed may have left the queue locked
        LOGGER.handlers, LOGGER.propagate = [QueueHandler(messages)], False
        LOGGER.setLevel(LEVELS["note"])
    if needed:
        import_module(needed)
    # The collector of garbage would look at all modules again and again.
    gc.freeze()


_working: list[bool] = []  # in a worker: whether the task that it has was interrupted; empty between tasks


def _interrupt(_number: int, _frame: Any) -> None:
    """Interrupt the task of a worker by a KeyboardInterrupt, so that it cleans up; without a task end the worker."""
    if not _working:
        os._exit(1)
    _working[0] = True
    raise KeyboardInterrupt


def _perform(perform: Callable[[Task], Any], task: Task) -> Any:
    """Perform a task; a worker that was interrupted ends then, since the pool would have it wait for another task."""
    _working[:] = [False]
    try:
        return perform(task)
    finally:
        if _working.pop():
            os._exit(1)


def _end_with_parent() -> None:
    # A worker waits for work on a pipe whose other end it holds itself, so it would never see that nobody is left.
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def check_processes_start(pool: ProcessPoolExecutor) -> None:
    """Refuse to go on if no worker process can be started, as in a script without a guard.

    Otherwise every task would seem to kill its worker.
    """
    try:
        pool.submit(os.getpid).result(START_LIMIT)
    except (BrokenProcessPool, TimeoutError) as error:
        fix = 'put the calls of the script below `if __name__ == "__main__":`, and make sure that enough memory is free'
        raise OptionError("worker processes end as soon as they are started", fix=fix) from error


def end_processes(pool: ProcessPoolExecutor, *, grace: float = 0.0) -> None:
    """End all processes of a pool and wait until they have ended; they may clean up for ``grace`` seconds."""
    # Before Python 3.14 there is no other way to them.
    processes = list((pool._processes or {}).values())
    until = monotonic() + grace
    for process in processes if grace else ():
        process.terminate()
    for process in processes:
        process.join(max(0.0, until - monotonic()))
        process.kill()
        process.join()


def perform_in_processes(
    tasks: Sequence[Task], perform: Callable[[Task], Any], jobs: int, *, grace: float = 0.0, forward: bool = False
) -> Generator[tuple[Task, Any], None, None]:
    """Perform tasks in processes, and give each with its result, or with the exception that it raised.

    A process may be killed for lack of memory, and its pool then does not say in which task. So the tasks that are left
    go to a pool of one process: if it is killed, it was in the first task that is left, whose outcome is
    `ProcessKilled`. The processes end if the caller wants no more results or is interrupted. With ``forward``,
    what they log is logged in this process too.
    """
    left = dict(enumerate(tasks))
    messages = _SPAWN.Queue() if forward else None
    listener = _Listener(messages, _Forwarder()) if messages else None
    if listener:
        listener.start()
    try:
        yield from _perform_left(left, perform, jobs, grace=grace, messages=messages)
    finally:
        if listener:
            listener.stop()


class _Listener(QueueListener):
    """Ends without writing into its queue, which a process that has ended meanwhile may have left locked."""

    _stopped = False

    def dequeue(self, block: bool) -> LogRecord:  # noqa: ARG002
        """The next record; `Empty` ends the thread, once the listener is stopped and nothing is left."""
        queue: Any = self.queue
        while not (self._stopped and queue.empty()):
            with suppress(Empty):
                record: LogRecord = queue.get(timeout=0.1)
                return record
        raise Empty

    def enqueue_sentinel(self) -> None:
        """Note that no record is wanted after those that are there."""
        self._stopped = True


class _Forwarder(Handler):
    """Logs in this process what another one has logged."""

    def emit(self, record: LogRecord) -> None:
        LOGGER.handle(record)


def _perform_left(
    left: dict[int, Task], perform: Callable[[Task], Any], jobs: int, *, grace: float, messages: Any
) -> Generator[tuple[Task, Any], None, None]:
    while left:
        jobs = min(jobs, len(left))
        with process_pool(jobs, messages=messages) as pool:
            try:
                check_processes_start(pool)
                futures = {}
                with suppress(BrokenProcessPool):
                    for number, task in left.items():
                        futures[pool.submit(_perform, perform, task)] = number
                for future in as_completed(futures):
                    error, number = future.exception(), futures.pop(future)  # which would keep all results
                    if not isinstance(error, BrokenProcessPool):
                        yield left.pop(number), future.result() if error is None else error
            finally:
                if left:
                    end_processes(pool, grace=grace)
        if left and jobs == 1:
            yield left.pop(next(iter(left))), ProcessKilled()
        jobs = 1
