"""Safetensors files byte by byte, so that every byte of them can be wrong, and a clock for what must not hang."""

import json
import signal
import tracemalloc
from contextlib import contextmanager


def blob(header, data=b""):
    """A file with this header: an object, or its JSON as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape, begin, end, dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


class TooLate(BaseException):
    """Not an Exception: the code under test must not take it for one of its own."""


@contextmanager
def limits(seconds, nbytes):
    """Fail if the block takes more processor time, or has more allocated at any moment.

    The time is that of the processor, so that a busy machine does not fail the test.
    """

    def too_late(signum, frame):
        raise TooLate(f"still running after {seconds} s")

    before = signal.signal(signal.SIGPROF, too_late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert peak <= nbytes, f"{peak:,} bytes were allocated where {nbytes:,} are enough"
