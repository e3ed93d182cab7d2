"""Ctrl-C and SIGTERM: the first one stops the command at whatever point it comes, and the command then cleans up."""

import os
import signal
import sys
from threading import Thread, get_ident
from time import monotonic, sleep
from types import FrameType

# Added to the number of the signal that ended a command, as shells do: 130 for SIGINT, 143 for SIGTERM.
SIGNALLED = 128
GRACE = 3.0  # seconds for the clean-up, in which further signals are ignored
AGAIN = 0.01  # seconds after which a signal that Python has ignored is sent again


def unwind_once() -> list[int]:
    """Let the first Ctrl-C or SIGTERM stop the command by `KeyboardInterrupt`, so that it cleans up.

    A second signal does not interrupt the clean-up, and after `GRACE` seconds a further signal ends the process. The
    returned list receives the number of the first signal. A signal that is ignored, or that other code handles, is left
    alone.

    Python ignores what is raised in a finaliser or in the callback of a weak reference, such as those that end an
    import. The signal is then sent again, since the command would go on to its end otherwise.
    """
    first: list[int] = []
    since: list[float] = []
    plain_hook = sys.unraisablehook

    def handle(number: int, frame: FrameType | None) -> None:
        if _is_within(frame, listen.__code__.co_name):
            _send_again(number)
        elif not first:
            first.append(number)
            since.append(monotonic())
            signal.default_int_handler(number, frame)  # raises KeyboardInterrupt, whatever the signal
        elif monotonic() - since[0] > GRACE:
            os._exit(SIGNALLED + first[0])

    def listen(ignored: "sys.UnraisableHookArgs") -> None:
        if first and isinstance(ignored.exc_value, KeyboardInterrupt):
            since.clear()
            _send_again(first.pop())
        else:
            plain_hook(ignored)

    for number, plain in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is plain:
            signal.signal(number, handle)
            sys.unraisablehook = listen
    return first


def _is_within(frame: FrameType | None, name: str) -> bool:
    """Whether a function of this file with this name has called the frame, or is the frame."""
    while frame is not None:
        if frame.f_code.co_name == name and frame.f_code.co_filename == __file__:
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    """Send the signal again to the thread that is running, the main one, once it has left what it is in now."""
    main_thread = get_ident()

    def send() -> None:
        sleep(AGAIN)
        if sys.platform == "win32":
            from _thread import interrupt_main

            interrupt_main(number)
        else:
            # A signal for the thread, unlike one for the process, also ends its waiting.
            signal.pthread_kill(main_thread, number)

    Thread(target=send, daemon=True).start()
