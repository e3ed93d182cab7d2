"""Output streams that make text harmless to a terminal: no text can move the cursor or hide other text.

Names of files, folders, shards and modules, and the metadata of files, come from other people. All of them are printed
through standard output and standard error, which therefore write control characters as escapes. Output that moves the
cursor on purpose (a progress bar, a line that is rewritten, colours) goes directly to the stream below.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any, TextIO, cast, final

import click

from loralens.errors import visible

_NARROWEST = 20  # columns; a message for fewer is left to the terminal
# Numbers of the palette of 256 colours, which no terminal changes. On white and on black their contrast is 3.9 or more.
# The first sixteen colours are often bright, and then green has a contrast of 2 on white.
COLOURS = {"error": 160, "warning": 164, "note": 27, "fine": 28}
_LEVEL = re.compile(r"(\s*)(error|warning|note):")
_SAID = [0]  # lines of messages on the terminal


def say(*lines: str, err: bool = False) -> None:
    """Print lines, on standard error if ``err`` is True; line ends inside a line, such as in a name, become escapes.

    Tables, JSON and CSV escape their contents themselves, since their text has line ends of its own.
    """
    for line in lines:
        click.echo(visible(line), err=err)


def say_message(text: str) -> None:
    """Print a message and its fix on standard error: a terminal gets lines that break between words.

    In a file or a pipe every line stays whole, so that programs can read it.
    """
    width = _terminal_width(sys.stderr)
    for line in map(visible, text.split("\n")):
        lines = [line]
        if width >= _NARROWEST and len(line) > width:
            from loralens.tables.text import wrap  # most messages are short

            lines = wrap(line, width, whole=True)
        for each in lines:
            print_styled(each, err=True)
        if width:
            _SAID[0] += sum(max(1, ceil(len(each) / width)) for each in lines)


def lines_said() -> int:
    """The number of lines of messages that the terminal shows already."""
    return _SAID[0]


def print_styled(line: str, *, err: bool = False, **style: Any) -> None:
    """Print a line, which must be `visible` already, in a style of click, and the name of a level in its colour.

    Without colours, as in a pipe, the line is printed as it is.
    """
    stream = sys.stderr if err else sys.stdout
    coloured = colours(stream)
    if coloured and (label := _LEVEL.match(line)):
        end = label.end()
        name = click.style(line[:end], fg=COLOURS[label[2]], bold=True)
        line = name + (click.style(line[end:], **style) if style else line[end:])
    elif coloured and style:
        line = click.style(line, **style)
    # To the stream below, since the escapes of the style must act on the terminal.
    click.echo(line, file=raw_stream(stream), color=coloured)


def colours(stream: TextIO) -> bool:
    """Whether what is written to a stream has colours: on a terminal, unless the user asks otherwise.

    https://no-color.org, https://force-color.org and https://bixense.com/clicolors say which variables ask.
    """
    given = os.environ.get
    if given("NO_COLOR"):
        return False
    if any(given(name, "0") not in ("", "0") for name in ("FORCE_COLOR", "CLICOLOR_FORCE")):
        return True
    return stream.isatty() and given("TERM") != "dumb" and given("CLICOLOR") != "0"


def _terminal_width(stream: TextIO) -> int:
    """The columns of the terminal that a stream writes to; 0 if it is none, or does not know its width."""
    try:
        return os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except (OSError, ValueError, AttributeError):
        return 0


@final
class Harmless:
    """A text stream that writes control characters as escapes, and otherwise behaves like the stream below it.

    It has no ``buffer``, so that no code can write past it.
    """

    def __init__(self, below: TextIO) -> None:
        self.below = below

    def write(self, text: str | bytes) -> int:
        """Write the text with control characters, except for line feeds and tabs, as escapes."""
        # click writes the scripts of shell completion as bytes.
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        self.below.write(visible(text, keep="\n\t"))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        # Bytes written to the buffer would go past `write`, and so past the escapes.
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self.below, name)


@contextmanager
def harmless_output() -> Iterator[None]:
    """Within the context, everything that is printed is harmless to a terminal."""
    # Restored at the end, so that a program that calls the group can print as before.
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        cast("TextIO", stream if isinstance(stream, Harmless) else Harmless(stream)) for stream in before
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def raw_stream(stream: TextIO) -> TextIO:
    """The stream below, for output that moves the cursor on purpose; names in it must be `visible` already."""
    return stream.below if isinstance(stream, Harmless) else stream


def occupy_closed_streams() -> None:
    """Open /dev/null for those of the file descriptors 0 to 2 that the caller has closed.

    Otherwise the next file that is opened would get one of these numbers, and output would be written into it. Writing
    to a closed standard output still fails, so that a lost answer is not mistaken for an empty one. What is written to
    a closed standard error is discarded.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # open() takes the lowest free number, which is this one.
            os.open(os.devnull, os.O_RDONLY if number < 2 else os.O_WRONLY)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
