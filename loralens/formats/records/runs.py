"""Reading training runs of several programs: checkpoints in order of their steps, and the logged losses.

A run is a folder with ``checkpoint-N`` folders in it, as ``loralens train`` and transformers' Trainer write them, or
with ``NNNNNNN_adapters.safetensors`` files of mlx-lm, or a list of adapters.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

from loralens.errors import LoraLensError, OptionError
from loralens.formats.files.container import read_json
from loralens.formats.files.json_text import finite_number
from loralens.formats.files.location import adapter_file, existing_path
from loralens.formats.records.training_log import log_entries

# written by transformers' Trainer into every checkpoint
STATE = "trainer_state.json"
LOG = "log.jsonl"  # the log of loralens train
_TRAINER = re.compile(r"checkpoint-(\d+)")
# mlx-lm's numbered copies, which lie in one folder
_MLX = re.compile(r"(\d+)_adapters\.safetensors")
# Fifteen digits are more than any run has, and fewer than a float64 or a 64-bit integer can hold.
_STEP = re.compile(r"(?:checkpoint|ckpt|step|iter)[-_ ]?(\d{1,15})", re.IGNORECASE)


class RunCheckpoint(NamedTuple):
    """One adapter of a run.

    Attributes
    ----------
    path
        A path for `loralens.formats.load`.
    step
        The optimiser's step: ``global_step`` of the trainer_state.json beside the adapter, else the number in the name
        of its file of mlx-lm, else the number in the name of the adapter or of the folder that contains it. None if
        there is no such number.
    """

    path: Path
    step: int | None


class LoggedLoss(NamedTuple):
    """A logged loss and its step."""

    value: float
    step: int


@final
@dataclass(frozen=True, slots=True)
class Run:
    """The checkpoints of a run in order of steps, and its losses.

    Checkpoints without a step come last, in the given order. ``source`` is the file of the losses: the
    trainer_state.json of the latest step, or the log of the run.
    """

    checkpoints: tuple[RunCheckpoint, ...]
    train: tuple[LoggedLoss, ...] = ()
    evaluation: tuple[LoggedLoss, ...] = ()
    source: Path | None = None

    @property
    def ordered(self) -> bool:
        """Whether all checkpoints have a step. Otherwise they have no order, and no conclusion can be drawn from it."""
        return all(checkpoint.step is not None for checkpoint in self.checkpoints)


def read_run(paths: Sequence[Path]) -> Run:
    """Read a run from its folder, or from the paths of its adapters.

    Raises
    ------
    OptionError
        A path does not exist, or there are fewer than two checkpoints, or two of the same step.
    FormatError
        A trainer_state.json cannot be read.
    """
    paths = [existing_path(path) for path in paths]
    # One path is the folder of a run; several are its adapters.
    members = _members(paths[0]) if len(paths) == 1 else list(paths)
    if len(members) < 2:
        what = f"{paths[0]}: holds {len(members) or 'no'} checkpoint{'s' if len(members) != 1 else ''}"
        raise OptionError(what, fix="give a folder with checkpoint-N folders in it, or two or more adapters")
    states = {path: state for path in [*paths, *members] if (state := _state(path))}
    checkpoints = [RunCheckpoint(path, _step(path, states)) for path in members]
    _check_steps(checkpoints)
    # Checkpoints without a step go last; sorted keeps their order.
    ordered = sorted(checkpoints, key=lambda checkpoint: (checkpoint.step is None, checkpoint.step or 0))
    # Without Trainer's states, the steps come from names, and losses from our own log if there is one.
    if not states:
        log = paths[0] / LOG
        entries = _log(log) if len(paths) == 1 and os.path.lexists(log) else []
        losses = _losses(entries, "loss"), _losses(entries, "eval_loss")
        return Run(tuple(ordered), *losses, log) if any(losses) else Run(tuple(ordered))
    # Every state has the whole history up to its step.
    latest = max(states, key=lambda path: _whole(states[path].get("global_step")) or 0)
    history = states[latest].get("log_history")
    entries = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    return Run(tuple(ordered), _losses(entries, "loss"), _losses(entries, "eval_loss"), _state_file(latest))


def checkpoint_step(path: Path) -> int | None:
    """The optimiser's step of one checkpoint, a file or its folder, as in `RunCheckpoint`; None if it is unknown."""
    # A state that cannot be read says nothing about the adapter beside it, nor does a path that no file can have.
    with suppress(LoraLensError, OSError):
        state = _state(path)
        return _step(path, {path: state} if state else {})
    return _step(path, {})


def nearest_loss(losses: Iterable[LoggedLoss], step: int | None) -> LoggedLoss | None:
    """The loss nearest to ``step``, the earlier one of two; None if there are no losses or no step."""
    if step is None:
        return None
    return min(losses, key=lambda loss: (abs(loss.step - step), loss.step), default=None)


def _members(folder: Path) -> list[Path]:
    """The checkpoints in a folder: those of Trainer, else those of mlx-lm."""
    # A single file is not a run.
    if not folder.is_dir():
        return []
    inside = list(folder.iterdir())
    trainer_folders = [path for path in inside if _TRAINER.fullmatch(path.name) and path.is_dir()]
    return trainer_folders or [path for path in inside if _MLX.fullmatch(path.name) and path.is_file()]


def _state_file(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / STATE


def _state(path: Path) -> Mapping[str, Any] | None:
    """The trainer_state.json in a folder, or beside a file that is the only adapter of its folder."""
    file = _state_file(path)
    # Files of mlx-lm lie in one folder, so a state there belongs to none of them alone.
    if _MLX.fullmatch(path.name) or not os.path.lexists(file):
        return None
    return read_json(file)


def _log(path: Path) -> list[Mapping[str, Any]]:
    """The lines of our own log with the keys of Trainer."""
    # Our log nests the measures, and Trainer's history has them flat.
    return [
        {**entry, "eval_loss": measures.get("loss")} if isinstance(measures := entry.get("evaluation"), dict) else entry
        for entry in log_entries(path)
    ]


def _step(path: Path, states: Mapping[Path, Mapping[str, Any]]) -> int | None:
    global_step = _whole(states.get(path, {}).get("global_step"))
    if global_step is not None:
        return global_step
    # mlx-lm's number takes precedence over a number in the name of a folder, which the user chose.
    file = _MLX.fullmatch(path.name) or _MLX.fullmatch(_only_adapter(path))
    named = [int(n) for part in (path.name, path.parent.name) for n in _STEP.findall(part)]
    return _whole(int(file[1])) if file else named[0] if named else None


def _only_adapter(path: Path) -> str:
    """The name of the adapter file in a folder; empty if the path is not a folder, or holds none or several."""
    with suppress(LoraLensError, OSError):
        return adapter_file(path).name if path.is_dir() else ""
    return ""


def _whole(value: Any) -> int | None:
    """The value if it can be a step, a whole number that fits into 64 bits; otherwise None."""
    return value if type(value) is int and 0 <= value < 2**63 else None


def _check_steps(checkpoints: Iterable[RunCheckpoint]) -> None:
    """Refuse two checkpoints of the same step, because they have no order."""
    paths: dict[int, Path] = {}
    for checkpoint in checkpoints:
        if checkpoint.step is not None and checkpoint.step in paths:
            what = f"{paths[checkpoint.step]} and {checkpoint.path} are both of step {checkpoint.step}"
            raise OptionError(what, fix="give the checkpoints of one run")
        if checkpoint.step is not None:
            paths[checkpoint.step] = checkpoint.path


def _losses(entries: Iterable[Mapping[str, Any]], name: str) -> tuple[LoggedLoss, ...]:
    """The finite losses in order of steps; of several for one step, the last."""
    values = {
        step: value
        for entry in entries
        if (step := _whole(entry.get("step"))) is not None and (value := finite_number(entry.get(name))) is not None
    }
    return tuple(LoggedLoss(value, step) for step, value in sorted(values.items()))
