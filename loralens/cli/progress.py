"""A bar with the time that is left, on stderr, and only where somebody looks at a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from loralens.cli.terminal import raw
from loralens.core.progress import Step
from loralens.core.progress import progress as progress
from loralens.errors import visible


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Step | None]:
    """What to call with every amount done, of ``total`` in all; None where stderr is no terminal."""
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
    with Progress(*columns, console=Console(file=raw(sys.stderr)), transient=True) as bar:
        task = bar.add_task(visible(label), total=total)
        yield lambda amount: bar.advance(task, amount)
