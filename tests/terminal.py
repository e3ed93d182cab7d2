"""A command on a pseudo-terminal: what it writes there."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Sequence

END = b"\x00"  # written to a terminal after all output of a command; no command prints it
# A bar of progress, which hides the cursor and is erased in the end.
_PROGRESS = re.compile(r"\x1b\[\?25l.*?\x1b\[\?25h(?:\r|\x1b\[\d*[AK])*", re.DOTALL)
ASKED = (
    "COLUMNS",
    "LINES",
    "NO_COLOR",
    "FORCE_COLOR",
    "CLICOLOR",
    "CLICOLOR_FORCE",
)  # what decides too


def read_until(terminal: int, end: int, wait: Callable[[], object]) -> str:
    """What is written to a pseudo-terminal until ``wait`` returns; both of its descriptors are closed then.

    The kernel may drop what is unread when the last descriptor of a terminal's end is closed. So this process keeps its
    own one open, and the end of the output is a mark, not a hang-up.
    """
    waiting = threading.Thread(target=lambda: (wait(), os.write(end, END)))
    waiting.start()
    written = bytearray()
    while not written.endswith(END):
        written += os.read(terminal, 1 << 16)
    waiting.join()
    os.close(end)
    os.close(terminal)
    return written.removesuffix(END).decode("utf-8").replace("\r\n", "\n")


def on_screen(words: Sequence[str], *, columns: int = 80, lines: int = 24, **more: str) -> tuple[int, str]:
    """Exit code of a command, and what stays on a terminal on which it is alone; ``more`` are environment variables."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ASKED} | {"TERM": "xterm-256color"} | more
    process = subprocess.Popen([sys.executable, "-m", "loralens", *words], stdout=theirs, stderr=theirs, env=env)
    told = read_until(ours, theirs, process.wait)
    return process.returncode, _PROGRESS.sub("", told)
