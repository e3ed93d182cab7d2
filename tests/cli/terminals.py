"""Commands under real pseudo-terminals of a given width, each forked from one process that has imported them.

``python -m tests.cli.terminals`` reads one JSON list per line: the width, and the words of a command. It answers with
the output of the command as JSON text.
"""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loralens.cli.main import main
from tests.cli.command import Command

LINES = 50  # of every terminal
END = b"\x00"  # written to a terminal after all output of a command; no command prints it


class Terminals:
    """A process that runs commands under pseudo-terminals, one after the other."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "TERM": "xterm", "XDG_CACHE_HOME": str(folder / "cache"), "NO_COLOR": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment.pop("COLUMNS", None)
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.terminals"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def run(self, width: int, words: Sequence[str]) -> str:
        """The standard output of a command in a terminal of that width."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([width, list(words)]) + "\n")
        self.process.stdin.flush()
        text: str = json.loads(self.process.stdout.readline())
        return text

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def show(width: int, words: Sequence[str]) -> str:
    """Run a command in a child whose standard output is a terminal of that width, and return its output."""
    terminal, end = pty.openpty()  # no terminal of a session: that would drop what is unread when its leader ends
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, width, 0, 0))
    child = os.fork()
    if not child:
        _in_child(end, words)
    return read_until(terminal, end, lambda: os.waitpid(child, 0))


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


def _in_child(terminal: int, words: Sequence[str]) -> Any:
    """Never returns."""
    try:
        os.dup2(terminal, 1)
        os.close(terminal)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # for the rest of its life
        main(list(words), standalone_mode=False)
        sys.stdout.flush()
    except Exception as error:  # noqa: BLE001  # the test shows it
        os.write(1, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(0)


if __name__ == "__main__":
    seen = set()
    for request in sys.stdin:
        columns, words = json.loads(request)
        # The command is run once here, so that every child finds what it imports.
        if tuple(words) not in seen:
            Command().run(*words)
            seen.add(tuple(words))
        print(json.dumps(show(columns, words)), flush=True)
