"""Work on many modules in plain threads."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Event, Thread
from typing import TypeVar

FEW = 16  # modules below which starting threads costs more than they save
MOST = 8  # threads: each holds the factors of one module

T = TypeVar("T")
Step = Callable[[int], None]  # is told how much more was done


def in_threads(work: Callable[[str], T], names: Sequence[str], count: int, step: Step | None = None) -> dict[str, T]:
    """``work`` of every name, in the order of ``names``, each of ``count`` threads taking every ``count``-th.

    A thread stops at its first error; what is left is done by the caller, who meets the first error in order. (A pool
    would cost 10 ms to import and as much to feed.) An interrupt lets every thread end with the name it works on. More
    than one thread pays only where BLAS itself uses one. ``step`` is told 1 after every name.
    """
    count = 1 if len(names) < FEW else min(count, MOST)
    found: dict[str, T] = {}
    interrupted = Event()

    def share(first: int) -> None:
        with suppress(Exception):  # a MemoryError too: whatever it is, the caller meets it
            for name in names[first::count]:
                if interrupted.is_set():
                    return
                found[name] = work(name)
                if step:
                    step(1)

    others = [Thread(target=share, args=(first,)) for first in range(1, count)]
    for thread in others:
        thread.start()
    try:
        share(0)
        for thread in others:
            thread.join()
    finally:  # after Ctrl-C or an error the others stop at their next name
        interrupted.set()
    return {name: found[name] if name in found else work(name) for name in names}
