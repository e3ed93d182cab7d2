"""Worker processes that measure files: how they start, and that they end with the process that started them."""

import gc
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from threading import Thread

from loralens.errors import OptionError

# BLAS reads these when NumPy is imported, which `_begin` precedes.
_BLAS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
START_LIMIT = 120.0  # seconds in which the first worker has to answer


def process_pool(workers: int) -> ProcessPoolExecutor:
    """A pool of processes that end when this process does, however it ends."""
    # Processes that are forked would hold the lock of the index open after this process was killed.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)


def _begin() -> None:
    """Prepare a worker: one thread of BLAS, no answer to Ctrl-C, an end with the process that started it."""
    for name in _BLAS:
        os.environ.setdefault(name, "1")
    # Ctrl-C in a terminal goes to all processes of its group. The one that started the workers decides what to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    import loralens.fleet.indexing.measuring  # noqa: F401  # what all tasks need

    # The collector of garbage would look at all modules again and again.
    gc.freeze()


def _end_with_parent() -> None:
    # A worker waits for work on a pipe whose other end it holds itself, so it would never see that nobody is left.
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def check_processes_start(pool: ProcessPoolExecutor) -> None:
    """Refuse to go on if no worker process can be started, as in a script without a guard.

    Otherwise every file would seem to kill its worker.
    """
    try:
        pool.submit(os.getpid).result(START_LIMIT)
    except (BrokenProcessPool, TimeoutError) as error:
        raise OptionError(
            "worker processes end as soon as they are started",
            fix='put the calls of the script below `if __name__ == "__main__":`, and see to it that there is memory',
        ) from error


def kill_processes(pool: ProcessPoolExecutor) -> None:
    """End all processes of a pool at once, whatever they are doing, and wait until they have ended."""
    # Before Python 3.14 there is no other way to them.
    processes = list((pool._processes or {}).values())
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
