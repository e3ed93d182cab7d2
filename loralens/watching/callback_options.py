"""What the callbacks of all trainers share: the options of their watcher, and the place of their log."""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TypedDict

from loralens.formats.records.watch_log import NAME
from loralens.watching.health import HealthWarning


class WatcherOptions(TypedDict, total=False):
    """Options of a `Watcher` that a callback passes on."""

    adapter: str | None
    modules: Sequence[str]
    gradients: bool
    base: str | PathLike[str] | None
    base_every: int
    keep: str | PathLike[str] | None
    on_warning: Callable[[HealthWarning], None] | None
    threads: int | None


def log_path(log: str | PathLike[str] | None, folder: str | PathLike[str], *, resumed: bool) -> Path:
    """The log that was asked for, else ``watch.jsonl`` in the folder of a trainer.

    If that is there and the run is not resumed, the path is the first of ``watch-2.jsonl``, ``watch-3.jsonl`` … that
    is free.
    """
    path = Path(folder) / NAME if log is None else Path(log)
    number, free = 2, path
    while log is None and not resumed and free.exists():
        free, number = path.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1
    return free
