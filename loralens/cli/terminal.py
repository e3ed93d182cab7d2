"""Output streams that make text harmless to a terminal: no text can move the cursor or hide other text.

Names of files, folders, shards and modules, and the metadata of files, come from other people. All of them are printed
through standard output and standard error, which therefore write control characters as escapes. Output that moves the
cursor on purpose (a progress bar, a line that is rewritten, colours) goes directly to the stream below.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast, final

import click

from loralens.errors import visible

_NARROWEST = 20  # columns; a message for fewer is left to the terminal


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
    for line in text.split("\n"):
        # A command between backticks stays whole, so that it can be copied.
        say(*([line] if "`" in line else _break_line(visible(line), width)), err=True)


def _terminal_width(stream: TextIO) -> int:
    """The columns of the terminal that a stream writes to; 0 if it is none, or does not know its width."""
    try:
        return os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except (OSError, ValueError, AttributeError):
        return 0


def _break_line(line: str, width: int) -> list[str]:
    if len(line) <= width or width < _NARROWEST:
        return [line]
    from textwrap import wrap  # most messages are short

    indent = " " * (len(line) - len(line.lstrip(" ")) + 2)
    # Long words are paths, and options have hyphens: neither is broken.
    return wrap(
        line,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        expand_tabs=False,
    )


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
