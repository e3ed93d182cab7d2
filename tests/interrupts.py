"""Interrupts of a function at any line that it runs, as Ctrl-C would stop it."""

import sys
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any


class Stop(BaseException):
    """Raised at any line, as Ctrl-C is."""


def stopped_at(line: int, act: Callable[[], object], files: Collection[str]) -> bool:
    """Whether ``act`` was stopped at the given number of lines that it runs of these files."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            count += 1
            if count == line:
                sys.settrace(None)
                raise Stop
        return trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except Stop:
        return True
    finally:
        sys.settrace(old)
    return False
