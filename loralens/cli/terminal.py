"""Output streams that make text harmless to a terminal: nothing in it moves the cursor or hides other text.

Names of files, folders, shards and modules and the metadata of files are somebody else's text. All of it is printed
through standard output and standard error, so it is made harmless there. What moves the cursor on purpose (a bar, a
line that is written again, colours) goes to the stream below.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast, final

import click

from loralens.errors import visible


def say(*lines: str, err: bool = False) -> None:
    """Print lines, on standard error with ``err``; a name in one of them begins no other line and leaves no gap.

    What is printed elsewhere (tables, JSON, CSV) knows by itself where its lines end.
    """
    for line in lines:
        click.echo(visible(line), err=err)


@final
class Harmless:
    """A text stream that writes control characters as escapes, and is the stream below in all else.

    It has no ``buffer``, so that nobody writes past it.
    """

    def __init__(self, below: TextIO) -> None:
        self.below = below

    def write(self, text: str | bytes) -> int:
        """The text with every character that is not for a terminal as an escape; lines and tabs stay.

        Bytes come from click, which writes the scripts of shell completion so.
        """
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        self.below.write(visible(text, keep="\n\t"))
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        """As `write`, each."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        # Bytes written to the buffer would go past `write`, and so past the escapes.
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self.below, name)


@contextmanager
def harmless_output() -> Iterator[None]:
    """Let all that is printed in the block be harmless to a terminal."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast("TextIO", _wrap_stream(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _wrap_stream(stream: TextIO | None) -> TextIO | Harmless:
    if stream is None:  # closed by who called us: what is said there is lost
        return Harmless(cast("TextIO", _DiscardingStream()))
    return stream if isinstance(stream, Harmless) else Harmless(stream)


def raw_stream(stream: TextIO) -> TextIO:
    """The stream below, for what moves the cursor on purpose; names in it must be `visible` already."""
    return stream.below if isinstance(stream, Harmless) else stream


@final
class _DiscardingStream:
    """A text stream that forgets."""

    encoding, errors = "utf-8", "replace"

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        """There is nothing to flush."""

    def isatty(self) -> bool:
        """It is no terminal."""
        return False


def occupy_closed_streams() -> None:
    """Open what takes the numbers 0 to 2 where the caller closed them: a file that got one would be printed into.

    Standard output fails when it is written to, so that nobody takes silence for an empty answer; what is said on
    standard error is lost.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number < 2 else os.O_WRONLY)  # the lowest free number: this one
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
