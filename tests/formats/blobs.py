"""Safetensors files byte by byte, so that every byte of them can be wrong, and limits of time and memory."""

import json
import re
import signal
import tracemalloc
from contextlib import contextmanager

from hypothesis import strategies as st

HARMFUL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")  # to a terminal


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


@st.composite
def damaged(draw, good):
    """Bytes flipped, cut out, repeated, put in or exchanged; up to four times."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        i, n = draw(st.integers(0, len(data))), draw(st.sampled_from([1, 1, 1, 2, 8, 100]))
        match draw(st.sampled_from(["flip", "set", "cut", "repeat", "insert", "move", "end"])):
            case "flip" if i < len(data):
                data[i] ^= 1 << draw(st.integers(0, 7))
            case "set":
                data[i : i + n] = draw(st.binary(min_size=n, max_size=n))
            case "cut":
                del data[i : i + n]
            case "repeat":
                data[i:i] = data[i : i + n]
            case "insert":
                data[i:i] = draw(
                    st.sampled_from([b"9", b"0", b"-", b'"', b"{", b"[", b"]", b"e9", b"null", b"\\u0000"])
                )
            case "move":
                j = draw(st.integers(0, len(data)))
                data[i : i + n], data[j : j + n] = data[j : j + n], data[i : i + n]
            case "end":
                del data[i:]
    return bytes(data)
