"""Threads that measure adapters take turns; only their transforms run side by side.

Threads of one process wait for each other wherever Python itself computes. NumPy lets another thread go on in each of
a thousand small steps, and the time in which threads wake each other is longer than most of these steps: two threads
take as long as one. If they take turns, they wake each other for a transform only.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()


class _Thread(threading.local):
    """Whether it is the turn of this thread."""

    has_turn = False


_thread = _Thread()


@contextmanager
def turn() -> Iterator[None]:
    """Wait until no other thread is in such a block."""
    with _lock:
        _thread.has_turn = True
        try:
            yield
        finally:
            _thread.has_turn = False


@contextmanager
def beside_others() -> Iterator[None]:
    """Let another thread take its turn during the block, if this thread has one."""
    if not _thread.has_turn:
        yield
        return
    _lock.release()
    try:
        yield
    finally:
        _lock.acquire()
