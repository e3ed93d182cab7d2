"""Running functions in threads, and how many processors there are for them."""

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
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
    """Call ``work`` for every name in at most ``count`` threads, and return the results in the order of ``names``.

    The first error in this order is raised, and calls that have not begun are left out then. More than one thread helps
    only if BLAS itself uses one. ``step`` is called with 1 after every name. Below ``few`` names there are no threads.
    """

    def call(name: K) -> T:
        result = work(name)
        if step:
            step(1)
        return result

    results = in_order([lambda name=name: call(name) for name in names], min(count, MOST), few=few, ahead=len(names))  # type: ignore[misc]
    return dict(zip(names, results, strict=True))


def in_order(calls: Sequence[Callable[[], T]], count: int, *, few: int = FEW, ahead: int | None = None) -> Iterator[T]:
    """Yield what the calls return, in their order, while ``count`` threads make the next ones.

    At most ``ahead`` results (default: twice as many as threads) are held or in work.
    """
    if count < 2 or len(calls) < few:
        yield from (call() for call in calls)
        return
    pool = ThreadPoolExecutor(count)
    waiting: deque[Future[T]] = deque()
    try:
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) >= (ahead or 2 * count):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # after an error and Ctrl-C too
        pool.shutdown(cancel_futures=True)


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
