"""Prints the messages of the verbs (``warning: …``, ``note: …``) and a progress bar on standard error."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from loralens.cli.terminal import raw_stream, say_message
from loralens.core.messages import LEVELS, Step, display_progress, messages_to
from loralens.errors import visible

BESIDE = 45  # columns of the bar, the share and the times, beside the label
# The names of the levels by number, which is what a record of logging contains.
NAMES = {number: name for name, number in LEVELS.items()}


class StandardError(logging.Handler):
    """Prints every message after its level, on the stream that is standard error at that moment."""

    def __init__(self) -> None:
        super().__init__()
        # The text of a message → the first file that it was about. Adapters of one program often have the same finding.
        self._first: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message. If it was printed for another file before, only that file is named."""
        level = NAMES.get(record.levelno, record.levelname.lower())
        text, place = record.getMessage(), getattr(record, "place", "")
        first = self._first.setdefault(f"{level}: {getattr(record, 'about', '')}", place) if place else place
        if first != place:
            text = f"{place}: the same as for {first}"
        # A message and its fix are two lines. Names in them have no line ends, since `tell` has escaped them.
        say_message(f"{level}: {text}")


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Step | None]:
    """A function to call with every amount that is done of ``total``; None if standard error is not a terminal."""
    # In a file or a pipe a bar would leave thousands of control characters.
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.theme import Theme

    from loralens.tables.text import shorten

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("so far,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    # transient: the bar disappears when it is done, so that the result stands alone.
    # The times of rich are yellow and cyan, which cannot be read on white.
    times = Theme({"progress.elapsed": "default", "progress.remaining": "default", "progress.percentage": "default"})
    console = Console(file=raw_stream(sys.stderr), theme=times)
    # A long path must leave room for the times.
    label = shorten(visible(label), max(console.width - BESIDE, BESIDE // 4))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda amount: bar.advance(task, amount)


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Within the context, messages of all levels and the progress of the verbs go to standard error."""
    with messages_to(StandardError()), display_progress(progress_bar):
        yield
