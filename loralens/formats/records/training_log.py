"""The log of a training run of our own, read again: losses by step, and evaluations in their order."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from loralens.formats.files.number import finite


@final
@dataclass(frozen=True, slots=True)
class History:
    """What a log says.

    Attributes
    ----------
    losses : mapping of int to float or None
        Step → its loss before the update; None where it had none.
    evaluations : tuple of (int, mapping of str to float or None)
        Steps done, and the measures.
    """

    losses: Mapping[int, float | None]
    evaluations: tuple[tuple[int, Mapping[str, float | None]], ...]


def history(path: Path) -> History:
    """The history in a log of ours; lines that a kill has cut short are left out."""
    losses: dict[int, float | None] = {}
    evaluations: list[tuple[int, Mapping[str, float | None]]] = []
    for entry in _entries(path):
        step, measures = entry["step"], entry.get("evaluation")
        if "loss" in entry:
            losses[step] = finite(entry["loss"])
        if isinstance(measures, dict):
            evaluations.append((step, {name: finite(value) for name, value in measures.items()}))
    return History(losses, tuple(evaluations))


def _entries(path: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            entries.append(entry)
    return entries
