"""The entry point of the command ``loralens`` and of ``python -m loralens``."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType


def start_commands() -> None:
    """Import the command line and run it; a Ctrl-C in the meantime ends the process with one word, not a traceback."""
    # A signal that is ignored, or that other code handles, is left alone.
    waits = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if waits:
        signal.signal(signal.SIGINT, _end)
    # The import takes longer than everything before it, and a short command.
    from loralens.cli.main import run

    if waits:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _end(number: int, frame: FrameType | None) -> None:
    """End at once: nothing has been begun that would have to be cleaned up."""
    del frame
    with suppress(OSError, AttributeError):  # standard error may be closed
        sys.stderr.write("interrupted\n")
        sys.stderr.flush()
    os._exit(128 + number)  # as shells count it, and as `loralens.cli.signals` does


if __name__ == "__main__":
    start_commands()
