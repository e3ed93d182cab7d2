"""The log of a watched run: a line of JSON that describes the modules, and one for each look.

The first line holds ``watch`` (the version of this layout, 1), ``every``, ``base``, ``gradients`` and ``modules``: name
→ ``shape``, ``rank`` and ``dtype``. Each further line is a look: ``step``, ``seconds`` (the time that the look took),
``modules`` (name → measures), ``total`` (measures of the whole adapter) and ``warnings``. docs/json.md says what every
key means.
"""

import json
from collections.abc import Mapping
from io import TextIOWrapper
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from loralens.core.lazy import Array
from loralens.errors import FormatError, OptionError, place
from loralens.formats.files.disk import disk_errors
from loralens.formats.files.json_text import finite_number, is_safe_text, json_or_none
from loralens.formats.files.regular import open_stream, read_whole

NAME = "watch.jsonl"  # the name of the log in the folder of a run
VERSION = 1
MOST_VALUES = 1 << 16  # most singular values of a module; ranks are far smaller
FIX = "give the log that a Watcher or a callback of loralens.watching wrote"


class LoggedModule(NamedTuple):
    """A module at one look: its singular values, largest first, and the other measures as they are in the log."""

    s: Array
    shape: tuple[int, int]
    rank: int
    measures: Mapping[str, Any]


class LoggedLook(NamedTuple):
    """One look: the steps done, the modules by name, the measures of the whole adapter, and the warnings."""

    step: int
    modules: Mapping[str, LoggedModule]
    total: Mapping[str, Any]
    warnings: tuple[Mapping[str, Any], ...]


@final
class WatchLog:
    """A log that is being written.

    Parameters
    ----------
    path : Path
    header : mapping
        The first line, without the version.
    resume : bool
        Whether to add to a log that is there.

    Raises
    ------
    OptionError
        The file exists and ``resume`` is false.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = path
        if path.exists():
            if not resume:
                raise OptionError(f"{path}: exists", fix="give another file, or move this one away")
            return
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.write({"watch": VERSION, **header})

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a line."""
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            # One line at a time, so a kill cuts off the last line at most.
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def is_watch_log(path: Path) -> bool:
    """Whether a file looks like the log of a watched run, judged by its name and its first bytes."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with open_stream(path) as file:
        return file.read(32).lstrip().startswith(b'{"watch"')


def cut_watch_log(path: Path, step: int) -> str:
    """The text of a log without the looks after a step; empty if its first line is not whole."""
    lines = read_whole(path).decode(errors="replace").splitlines(keepends=True)
    earlier_lines: list[str] = []
    for line in lines:
        entry = json_or_none(line)
        # Lines that a kill cut off are not objects.
        if not isinstance(entry, dict):
            continue
        number = entry.get("step")
        if (type(number) is int and number <= step) if earlier_lines else "watch" in entry:
            earlier_lines.append(line)
    return "".join(earlier_lines)


def read_watch_log(path: Path) -> list[LoggedLook]:
    """The looks of a log in order of steps. If two have the same step, the later one counts: a resumed run wrote it.

    Lines that were cut off when a run was killed are left out.

    Raises
    ------
    FormatError
        The file is not such a log, is of a later version, or its numbers contradict each other.
    """
    with place(path):
        with TextIOWrapper(open_stream(path), encoding="utf-8", errors="replace") as file:
            entries = [entry for line in file if isinstance(entry := json_or_none(line), dict)]
        if not entries or not isinstance(entries[0].get("watch"), int):
            raise FormatError("is not the log of a watched run", fix=FIX)
        if entries[0]["watch"] > VERSION:
            raise FormatError(
                f"is a log of version {entries[0]['watch']!a:.20}, and this release reads {VERSION}",
                fix="update loralens",
            )
        described = _shapes_and_ranks(entries[0].get("modules"))
        looks = {look.step: look for entry in entries[1:] if (look := _look(entry, described)) is not None}
    return [looks[step] for step in sorted(looks)]


def _shapes_and_ranks(modules: Any) -> dict[str, tuple[tuple[int, int], int]]:
    """Shape and rank of every module."""
    described = {}
    for name, about in modules.items() if isinstance(modules, dict) else ():
        shape, rank = (about.get("shape"), about.get("rank")) if isinstance(about, dict) else (None, None)
        sizes = shape if isinstance(shape, list) else []
        numbers = [number for number in (*sizes, rank) if type(number) is int and 0 < number < 2**63]
        if len(sizes) != 2 or len(numbers) != 3 or not is_safe_text(name):
            raise FormatError(f"its first line does not describe {name!a:.80}", fix=FIX)
        described[name] = ((numbers[0], numbers[1]), numbers[2])
    if not described:
        raise FormatError("its first line names no modules", fix=FIX)
    return described


def _look(entry: Mapping[str, Any], described: Mapping[str, tuple[tuple[int, int], int]]) -> LoggedLook | None:
    """One look; None for a line of another kind."""
    step, modules = entry.get("step"), entry.get("modules")
    if type(step) is not int or not 0 <= step < 2**63 or not isinstance(modules, dict):
        return None
    logged = {}
    for name, measures in modules.items():
        if name not in described or not isinstance(measures, dict):
            raise FormatError(f"step {step} has a module that its first line does not name: {name!a:.80}", fix=FIX)
        logged[name] = LoggedModule(_singular_values(step, name, measures.get("s")), *described[name], measures)
    total, warnings = entry.get("total"), entry.get("warnings")
    return LoggedLook(
        step,
        logged,
        total if isinstance(total, dict) else {},
        tuple(warning for warning in warnings if _is_warning(warning)) if isinstance(warnings, list) else (),
    )


def _singular_values(step: int, name: str, values: Any) -> Array:
    numbers = [finite_number(value) for value in values] if isinstance(values, list) else [None]
    s = np.array([number for number in numbers if number is not None and isfinite(number)], dtype=np.float64)
    if len(s) < len(numbers) or len(s) > MOST_VALUES or (s < 0).any() or (np.diff(s) > 0).any():
        raise FormatError(f"step {step}: the singular values of {name} are not numbers that fall", fix=FIX)
    return s


def _is_warning(warning: Any) -> bool:
    return isinstance(warning, dict) and all(is_safe_text(warning.get(key)) for key in ("code", "text", "fix"))
