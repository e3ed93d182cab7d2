"""Commands under real pseudo-terminals of a given width, each forked from one process that has imported them.

``python -m tests.cli.terminals`` takes a JSON list a line, the width and the words of a command, and answers with the
JSON text of what the command wrote to its terminal.
"""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from loralens.cli.main import main

LINES = 50  # of every terminal


class Terminals:
    """A process that runs commands under pseudo-terminals, one after the other."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "TERM": "xterm", "XDG_CACHE_HOME": str(folder / "cache"), "NO_COLOR": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment.pop("COLUMNS", None)
        environment["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), environment.get("PYTHONPATH", "")])
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
        """What a command writes to the standard output of a terminal so wide."""
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
    """Run a command in a child whose standard output is a terminal so wide; what it wrote."""
    terminal, end = pty.openpty()  # no terminal of a session: that would drop what is unread when its leader ends
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, width, 0, 0))
    child = os.fork()
    if not child:
        _in_child(end, words)
    os.close(end)
    written = bytearray()
    while True:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        written += piece
    os.close(terminal)
    os.waitpid(child, 0)
    return written.decode("utf-8").replace("\r\n", "\n")


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
        if tuple(words) not in seen:  # what it imports is then there for every child
            CliRunner().invoke(main, words)
            seen.add(tuple(words))
        print(json.dumps(show(columns, words)), flush=True)
