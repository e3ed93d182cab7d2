"""Ctrl-C and SIGTERM: the first one stops the command at whatever point it comes, and the command then cleans up."""

import os
import signal
from time import monotonic
from types import FrameType

# Added to the number of the signal that ended a command, as shells do: 130 for SIGINT, 143 for SIGTERM.
SIGNALLED = 128
GRACE = 3.0  # seconds for the clean-up, in which further signals are ignored


def unwind_once() -> list[int]:
    """Let the first Ctrl-C or SIGTERM stop the command by `KeyboardInterrupt`, so that it cleans up.

    A second signal does not interrupt the clean-up, and after `GRACE` seconds a further signal ends the process. The
    returned list receives the number of the first signal. A signal that is ignored, or that other code handles, is left
    alone.
    """
    first: list[int] = []
    since: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if not first:
            first.append(number)
            since.append(monotonic())
            signal.default_int_handler(number, frame)  # raises KeyboardInterrupt, whatever the signal
        elif monotonic() - since[0] > GRACE:
            os._exit(SIGNALLED + first[0])

    for number, plain in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is plain:
            signal.signal(number, handle)
    return first
