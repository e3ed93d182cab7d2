"""Training runs on disk: their checkpoints in order of steps, and the losses that were logged on the way.

A run is a folder with ``checkpoint-N`` folders in it, as ``loralens train`` and transformers' Trainer leave them, or
with ``NNNNNNN_adapters.safetensors`` files, as mlx-lm does; or a list of adapters, each named by hand.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from loralens.errors import LoraLensError, OptionError
from loralens.formats.files.container import read_json
from loralens.formats.files.location import adapter_file, existing
from loralens.formats.files.number import finite

STATE = "trainer_state.json"
LOG = "log.jsonl"  # of loralens train
_TRAINER = re.compile(r"checkpoint-(\d+)")
_MLX = re.compile(r"(\d+)_adapters\.safetensors")
_STEP = re.compile(r"(?:checkpoint|ckpt|step|iter)[-_ ]?(\d{1,15})", re.IGNORECASE)


@final
@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One adapter of a run.

    Attributes
    ----------
    path : Path
        What `loralens.formats.load` takes.
    step : int or None
        Optimizer step: ``global_step`` of the trainer_state.json beside it, else the number in its name, or in that of
        the only file of mlx-lm in it; None where none says.
    """

    path: Path
    step: int | None


@final
@dataclass(frozen=True, slots=True)
class Loss:
    """A logged loss and the step it was logged at."""

    value: float
    step: int


@final
@dataclass(frozen=True, slots=True)
class Run:
    """Checkpoints in order of steps, those without a step last, as given; and the losses on the way, by step.

    ``source`` is the file that the losses come from: the trainer_state.json of the latest step, or the log of the run.
    """

    checkpoints: tuple[Checkpoint, ...]
    train: tuple[Loss, ...] = ()
    evaluation: tuple[Loss, ...] = ()
    source: Path | None = None

    @property
    def ordered(self) -> bool:
        """Whether all checkpoints have a step: without it there is no order, and nothing to conclude from one."""
        return all(checkpoint.step is not None for checkpoint in self.checkpoints)


def run_of(paths: Sequence[Path]) -> Run:
    """The run that these paths are: one folder with checkpoints in it, or the adapters themselves.

    Raises
    ------
    OptionError
        Nothing is there, fewer than two checkpoints, or two of one step.
    FormatError
        A trainer_state.json that cannot be read.
    """
    paths = [existing(path) for path in paths]
    members = _members(paths[0]) if len(paths) == 1 else list(paths)
    if len(members) < 2:
        raise OptionError(
            f"{paths[0]}: holds {len(members) or 'no'} checkpoint{'s' if len(members) != 1 else ''}",
            fix="give a folder with checkpoint-N folders in it, or two or more adapters",
        )
    states = {path: state for path in [*paths, *members] if (state := _state(path))}
    checkpoints = [Checkpoint(path, _step(path, states)) for path in members]
    _check_steps(checkpoints)
    ordered = sorted(checkpoints, key=lambda checkpoint: (checkpoint.step is None, checkpoint.step or 0))
    if not states:
        log = paths[0] / LOG
        entries = _log(log) if len(paths) == 1 and log.is_file() else []
        losses = _losses(entries, "loss"), _losses(entries, "eval_loss")
        return Run(tuple(ordered), *losses, log) if any(losses) else Run(tuple(ordered))
    latest = max(states, key=lambda path: _whole(states[path].get("global_step")) or 0)
    history = states[latest].get("log_history")
    entries = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    return Run(tuple(ordered), _losses(entries, "loss"), _losses(entries, "eval_loss"), _state_file(latest))


def nearest(losses: Iterable[Loss], step: int | None) -> Loss | None:
    """The loss logged nearest to ``step``, the earlier of two; None where nothing was logged or no step is known."""
    if step is None:
        return None
    return min(losses, key=lambda loss: (abs(loss.step - step), loss.step), default=None)


def _members(folder: Path) -> list[Path]:
    """The checkpoints in a folder: Trainer's, else mlx-lm's."""
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
    if _MLX.fullmatch(path.name) or not file.is_file():
        return None
    return read_json(file)


def _log(path: Path) -> list[Mapping[str, Any]]:
    """The lines of our own log, as Trainer would have them; one that is cut short is left out."""
    entries: list[Mapping[str, Any]] = []
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            evaluation = entry.get("evaluation")
            measured = {"eval_loss": evaluation.get("loss")} if isinstance(evaluation, dict) else {}
            entries.append({**entry, **measured})
    return entries


def _step(path: Path, states: Mapping[Path, Mapping[str, Any]]) -> int | None:
    global_step = _whole(states.get(path, {}).get("global_step"))
    if global_step is not None:
        return global_step
    file = _MLX.fullmatch(path.name) or _MLX.fullmatch(_only_adapter(path))
    named = [int(n) for part in (path.name, path.parent.name) for n in _STEP.findall(part)]
    return _whole(int(file[1])) if file else named[0] if named else None


def _only_adapter(path: Path) -> str:
    """The name of the file that a folder is read from; empty where that is no question, or has no answer."""
    if not path.is_dir():
        return ""
    with suppress(LoraLensError):
        return adapter_file(path).name
    return ""


def _whole(value: Any) -> int | None:
    """A step; None where it is none, or one that no run reaches and float64 need not hold."""
    return value if type(value) is int and 0 <= value < 2**63 else None


def _check_steps(checkpoints: Iterable[Checkpoint]) -> None:
    """Two checkpoints of one step have no order."""
    paths: dict[int, Path] = {}
    for checkpoint in checkpoints:
        if checkpoint.step is not None and checkpoint.step in paths:
            raise OptionError(
                f"{paths[checkpoint.step]} and {checkpoint.path} are both of step {checkpoint.step}",
                fix="give the checkpoints of one run",
            )
        if checkpoint.step is not None:
            paths[checkpoint.step] = checkpoint.path


def _losses(entries: Iterable[Mapping[str, Any]], name: str) -> tuple[Loss, ...]:
    """Finite losses by step; of one step the last."""
    values = {
        step: value
        for entry in entries
        if (step := _whole(entry.get("step"))) is not None and (value := finite(entry.get(name))) is not None
    }
    return tuple(Loss(value, step) for step, value in sorted(values.items()))
