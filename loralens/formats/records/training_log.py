"""Reading the log of ``loralens train``: losses by step, and evaluations in order."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from loralens.formats.files.json_text import finite_number, json_or_none
from loralens.formats.files.regular import read_whole


class History(NamedTuple):
    """The losses and evaluations in a log.

    Attributes
    ----------
    losses
        Step → the loss before its update; None if the log holds no finite number.
    evaluations
        The number of steps before each evaluation, and its measures.
    """

    losses: Mapping[int, float | None]
    evaluations: tuple[tuple[int, Mapping[str, float | None]], ...]


def history(path: Path) -> History:
    """Read a log; lines that were cut off when a run was killed are left out."""
    losses: dict[int, float | None] = {}
    evaluations: list[tuple[int, Mapping[str, float | None]]] = []
    for entry in log_entries(path):
        step, measures = entry["step"], entry.get("evaluation")
        if "loss" in entry:
            losses[step] = finite_number(entry["loss"])
        # Lines of steps have no evaluation.
        if isinstance(measures, dict):
            evaluations.append((step, {name: finite_number(value) for name, value in measures.items()}))
    return History(losses, tuple(evaluations))


def log_entries(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that have a step; lines that were cut off when a run was killed are left out."""
    entries: list[dict[str, Any]] = []
    for line in read_whole(path).decode(errors="replace").splitlines() if os.path.lexists(path) else ():
        entry = json_or_none(line)
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            entries.append(entry)
    return entries
