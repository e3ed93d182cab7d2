"""Running a function for many modules in threads, and how many processors there are for it."""

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Condition, Event, Semaphore, Thread
from typing import TypeVar

FEW = 16  # number of modules below which starting threads costs more than they save
MOST = 8  # most threads, since each of them has the factors of one module in memory

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
Step = Callable[[int], None]  # is called with the amount of work that was done since the last call


# How many processes of one run share the processors; a process that works for a batch sets it once.
_sharers = 1


def processor_count() -> int:
    """The number of processors that this process may use, at least 1."""
    # The affinity counts only those that a container or a scheduler allows; macOS and Windows do not have it.
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, count // _sharers)


def share_processors(processes: int) -> None:
    """Let this process use only its part of the processors, which ``processes`` processes share."""
    global _sharers  # a property of the process, as the affinity is
    _sharers = processes


def in_threads(
    work: Callable[[K], T], names: Sequence[K], count: int, step: Step | None = None, *, few: int = FEW
) -> dict[K, T]:
    """Call ``work`` for every name in threads, and return the results in the order of ``names``.

    Each of ``count`` threads takes the next name that is left. After an error or an interrupt every thread ends
    with its current name. The caller's thread then repeats the missing names in order, and so raises the first
    error; an error that does not come again, as for lack of memory, is forgotten. More than one thread helps only
    if BLAS itself uses one. ``step`` is called with 1 after every name. Plain threads are used because a pool would
    cost 10 ms to import, and as much again to run. Below ``few`` names, which are done before the threads would
    have started, there are none.
    """
    count = 1 if len(names) < few else min(count, MOST)
    results: dict[K, T] = {}
    ended = Event()
    waiting = iter(names)  # shared: Python's lock lets one thread at a time take a name

    def take() -> None:
        try:
            for name in waiting:
                if ended.is_set():
                    return
                results[name] = work(name)
                if step:
                    step(1)
        except Exception:  # noqa: BLE001  # of any kind: the caller's thread repeats this name, and so raises it again
            ended.set()

    # The caller's thread takes names too, so one thread fewer is started.
    workers = [Thread(target=take) for _ in range(1, count)]
    try:
        for thread in workers:
            thread.start()
        take()
        for thread in workers:
            thread.join()
    finally:  # after Ctrl-C too
        # Threads cannot be killed; they look at this flag before each name.
        ended.set()
    for name in names:
        # A name whose work failed in a thread is repeated here, so that the error has the caller's traceback.
        if name not in results:
            results[name] = work(name)
            if step:
                step(1)
    return {name: results[name] for name in names}


def in_order(calls: Sequence[Callable[[], T]], count: int) -> Iterator[T]:
    """Yield what the calls return, in their order, while ``count`` threads make the next ones.

    At most twice as many results as threads are held or in work. A call that fails in a thread is repeated in the
    caller's thread, which then raises the error. After an interrupt every thread ends with its current call.
    """
    if count < 2 or len(calls) < FEW:
        yield from (call() for call in calls)
        return
    results: dict[int, T] = {}
    failed: set[int] = set()
    places = iter(range(len(calls)))
    changed, room, stopped = Condition(), Semaphore(2 * count), Event()

    def work() -> None:
        while True:
            room.acquire()
            with changed:
                i = None if stopped.is_set() else next(places, None)
            if i is None:
                return
            try:
                result = calls[i]()
            except Exception:  # noqa: BLE001  # of any kind: the caller's thread will raise it again
                with changed:
                    failed.add(i)
                    changed.notify()
                continue
            with changed:
                results[i] = result
                changed.notify()

    workers = [Thread(target=work) for _ in range(count)]
    try:
        for thread in workers:
            thread.start()
        for i, call in enumerate(calls):
            with changed:
                while not (i in results or i in failed):
                    changed.wait()
            yield call() if i in failed else results.pop(i)
            room.release()
    finally:
        stopped.set()
        for _ in workers:
            room.release()
        for thread in workers:
            if thread.ident is not None:  # an interrupt may have come before it was started
                thread.join()


def single_blas_thread() -> AbstractContextManager[object]:
    """Let BLAS use one thread within the block, where the package threadpoolctl is installed.

    The command line does so for the whole process. A program that has imported NumPy already cannot, and several
    threads of BLAS make thin products up to ten times slower, since they wait for each other.
    """
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return nullcontext()
    limits: AbstractContextManager[object] = ThreadpoolController().limit(limits=1, user_api="blas")
    return limits
