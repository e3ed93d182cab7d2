"""Prints the messages of the verbs (``warning: …``, ``note: …``) and a progress bar on standard error."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from loralens.cli.terminal import raw_stream, say
from loralens.core.messages import LEVELS, LOGGER
from loralens.core.progress import Step, display_progress
from loralens.errors import visible

# Levels by number, as records of logging hold them.
NAMES = {number: name for name, number in LEVELS.items()}


class StandardError(logging.Handler):
    """Prints every message with its level before it, to what is standard error at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        level = NAMES.get(record.levelno, record.levelname.lower())
        say(*f"{level}: {record.getMessage()}".split("\n"), err=True)  # names in it hold no line ends


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Step | None]:
    """What to call with every amount done, of ``total`` in all; None where stderr is no terminal."""
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

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # transient: when it is done the bar disappears, and the result stands alone.
    with Progress(*columns, console=Console(file=raw_stream(sys.stderr)), transient=True) as bar:
        task = bar.add_task(visible(label), total=total)
        yield lambda amount: bar.advance(task, amount)


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Within the block, messages of all levels and the progress of the verbs go to standard error."""
    handler, level, propagate = StandardError(), LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # they have been shown
    try:
        with display_progress(progress_bar):
            yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate
