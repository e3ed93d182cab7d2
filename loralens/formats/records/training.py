"""The files of a run of ``loralens train``, while it runs and when it is finished.

While it runs, it is a folder beside its target, ``OUT.unfinished``, with

==================== ===============================================================================================
``run.json``         the description of the run: everything that must be the same to resume it
``run.toml``         the settings, as options of another run
``log.jsonl``        one object on each line: steps and evaluations
``watch.jsonl``      the snapshots of a watcher (`loralens.formats.records.training`)
``state.safetensors`` the latest state, from which the run is resumed
``checkpoint-N/``    snapshots of the adapter
``trainer/``         what the loggers of TRL write
==================== ===============================================================================================

At its end the adapter is written beside these, and the folder takes the name of the target. So a target is a finished
run or does not exist. The state stays, so that the run can go on with more steps. The process that writes holds a lock
on the folder, so that a second one is refused.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array, LazyArray
from loralens.core.names import natural_key, some
from loralens.core.stored import State, parse_json
from loralens.errors import FormatError, LoraLensError, MismatchError, OptionError, place, target_exists
from loralens.formats import save
from loralens.formats.files.adapter_files import write_safetensors
from loralens.formats.files.atomic import atomic_file, is_moved_aside, keep_mode, move_aside, remove, tidy
from loralens.formats.files.container import CONFIG, Stored, read_json, read_safetensors
from loralens.formats.files.disk import Hold, check_free, check_room, disk_errors
from loralens.formats.files.json_text import finite_number, is_safe_text, json_or_none
from loralens.formats.files.location import NAMES, SUFFIXES, existing_path, find_adapter
from loralens.formats.files.outside import open_stream, read_whole

KEY = "loralens.training"  # the key in the metadata of a state
RUN, LOG, STATE = "run.json", "log.jsonl", "state.safetensors"
RUN_FILE = "run.toml"  # the settings, which another run can read
WATCHED = "watch.jsonl"  # the log of a watcher
TRAINER = "trainer"  # the folder of the loggers of TRL
UNFINISHED = ".unfinished"  # the suffix of the folder of a run that is not finished
_OWN = re.compile(
    rf"{TRAINER}/.*|{RUN}|{RUN_FILE}|{LOG}|{WATCHED}|{STATE}|(checkpoint-[0-9]+/)?({NAMES[0]}|{CONFIG})"
)  # the files of a run
REPLACES = "replaces"  # the key in run.json that says whether the run replaces an existing target
GRID = "grid"  # the key in run.json of what a grid records of one of its runs


@final
class Training:
    """The files of one run.

    Parameters
    ----------
    target : Path
        The folder of the finished run.

    Raises
    ------
    OptionError
        The target has no name of its own (``.``, ``/``), or it has the suffix of a file of weights.
    """

    def __init__(self, target: Path) -> None:
        # Its hidden and unfinished names are made of its own name.
        if target.name in ("", ".."):
            raise OptionError(f"{target}: is not a name for a run", fix="give a folder that is not there yet")
        if target.suffix in SUFFIXES:
            what = f"{target}: a run is a folder, not a {target.suffix} file"
            raise OptionError(what, fix=f"give {target.with_suffix('')}")
        self.target = target
        self.folder = target.with_name(target.name + UNFINISHED)
        self._hold = Hold()

    def begin(self, run: Mapping[str, Any], *, overwrite: bool, settings: str = "") -> None:
        """Make the folder of a new run.

        Raises
        ------
        OptionError
            The target or an unfinished run of that name exists and ``overwrite`` is false, or it is not a run of
            loralens, or another process is writing there.
        """
        with place(self.target), disk_errors():
            tidy(self.target)  # restores a target that a killed run had moved aside
        self.check(overwrite=overwrite)
        with place(self.folder), disk_errors():
            # The lock is on the folder itself, so it is taken before the old one is removed, and again for the new one.
            if self.folder.exists():
                self._hold.take(self.folder)
                shutil.rmtree(self.folder)
                self._hold.release()
            self.folder.mkdir(parents=True)
            self._hold.take(self.folder)
        self._write(RUN, json.dumps({**run, REPLACES: overwrite}, indent=2) + "\n")
        if settings:
            self._write(RUN_FILE, settings)

    def check(self, *, overwrite: bool) -> None:
        """Raise the errors that `begin` would raise, and change nothing."""
        # Each of these cases has another remedy, so each has a message of its own.
        for folder in (self.target, self.folder):
            if folder.exists() and not folder.is_dir():
                raise OptionError(f"{folder}: is a file, but a run is a folder", fix="choose another target")
            replaced = folder.exists() and (overwrite or folder == self.folder)
            if replaced and not _ours(folder):
                what = f"{folder}: holds no training run, so it is not replaced"
                raise OptionError(what, fix="choose another target")
            if replaced and overwrite and (strangers := _strangers(folder)):
                what = f"{folder}: holds files that no run wrote, which would be lost: {some(strangers)}"
                raise OptionError(what, fix="move it elsewhere, or choose another target")
        if self.folder.exists() and not self._hold.is_taken:
            check_free(self.folder)
        if (self.folder / RUN).exists() and not overwrite:
            state = None
            with suppress(FormatError):
                state = self._state()
            progress = f" that stopped after step {state.step}" if state else ""
            what = f"{self.folder}: holds an unfinished run{progress}"
            raise OptionError(what, fix="continue it with --resume, or begin again with --overwrite")
        if (self.target.exists() or is_moved_aside(self.target)) and not overwrite:
            raise target_exists(self.target)
        check_room(self.target)

    def resume(self, run: Mapping[str, Any]) -> State | None:
        """Resume an unfinished run: returns its state, and removes from the logs what came after it.

        None if no state had been saved yet, so that the run begins anew.

        Raises
        ------
        OptionError
            There is no unfinished run, or another process is writing there.
        MismatchError
            It is a run with other options. The message names the differences.
        """
        if not (self.folder / RUN).exists():
            done = f"{self.target} is finished" if (self.target / RUN).exists() else f"{self.folder} is not there"
            raise OptionError(f"there is no run to go on with: {done}", fix="leave out --resume")
        self._hold.take(self.folder)
        with place(self.folder):
            self._check_same(run)
            state = self._state()
        for part in self.folder.glob(".*.part"):  # files that a killed run left incomplete
            remove(part)
        self._cut(state.step if state else -1)
        return state

    def steps(self) -> int:
        """The number of steps of the finished run, or of the unfinished one that goes on from it.

        Raises
        ------
        OptionError
            There is no run.
        """
        for folder in (self.folder, self.target):
            if (folder / RUN).exists():
                with place(folder):
                    steps = read_json(folder / RUN).get("steps")
                    if not isinstance(steps, int):
                        raise FormatError(f"{RUN} does not say how many steps the run has", fix="train it anew")
                return steps
        raise OptionError(f"{self.target}: there is no run to continue", fix="leave out --more-steps")

    def finished(self, run: Mapping[str, Any]) -> State:
        """The state after the last step of a finished run, which may go on with more steps.

        Raises
        ------
        OptionError
            There is no finished run, or it has no state of its last step; or there is an unfinished run of that name.
        MismatchError
            It is a run with other options. The message names the differences.
        """
        if (self.folder / RUN).exists():
            raise OptionError(f"{self.folder}: holds an unfinished run", fix="go on with it: add --resume")
        steps = self.steps()
        with place(self.target):
            self._check_same({**run, "steps": steps}, self.target)
            state = self._state(self.target)
            if state is None or state.step != steps:
                what = "has no state of its last step (older releases removed it, and --patience may end before it)"
                raise OptionError(what, fix="begin a new run with its adapter: --start-from")
        return state

    def extend(self, run: Mapping[str, Any]) -> None:
        """Make a finished run an unfinished one with more steps."""
        with place(self.target), disk_errors():
            self.target.rename(self.folder)
        with place(self.folder), disk_errors():
            self._hold.take(self.folder)
        self._write(RUN, json.dumps({**run, REPLACES: False}, indent=2) + "\n")

    def mark_as_diverged(self, message: str) -> None:
        """Record in what a grid keeps of the run that it has diverged."""
        run = read_json(self.folder / RUN)
        self._write(RUN, json.dumps({**run, GRID: {**run[GRID], "diverged": message}}, indent=2) + "\n")

    def _check_same(self, run: Mapping[str, Any], folder: Path | None = None) -> None:
        """Refuse a folder with another run than this."""
        saved_run = {
            name: value
            for name, value in read_json((folder or self.folder) / RUN).items()
            if name not in (REPLACES, GRID)
        }
        this_run = json.loads(json.dumps(run))  # as it would be read back: tuples are lists in JSON
        other = [name for name in {**saved_run, **this_run} if saved_run.get(name) != this_run.get(name)]
        if other:
            values = ((n, _short(saved_run.get(n)), _short(this_run.get(n))) for n in other[:3])
            differences = "; ".join(f"{name} is {there} there, {here} here" for name, there, here in values)
            fix = "go on with the same options, or replace it: --overwrite"
            raise MismatchError(f"holds another run: {differences}", fix=fix)

    def log(self, record: Mapping[str, Any]) -> None:
        """Add a line to the log."""
        _add_line(self.folder / LOG, record)

    def save(self, state: State) -> None:
        """Replace the state, completely or not at all."""
        # Tensors are stored as such, and everything else as JSON in the metadata.
        record = {"step": state.step, "record": dict(state.record), "run": dict(state.run)}
        tensors = {name: LazyArray.of(array) for name, array in state.tensors.items()}
        write_safetensors(Stored(tensors, {KEY: json.dumps(record)}), self.folder / STATE)

    def snapshot(self, step: int, adapter: Adapter) -> Path:
        """Write the adapter as it is after a step; returns its folder."""
        path = self.folder / f"checkpoint-{step}"
        save(adapter, path, overwrite=True)
        return path

    def finish(self, adapter: Adapter) -> None:
        """Write the adapter and give the folder the name of the target. Only then an old target is removed.

        Raises
        ------
        OptionError
            The target was created by somebody else meanwhile. The finished run stays in its folder.
        """
        with place(self.folder), disk_errors():
            # A run that was killed here has left the same adapter already.
            (self.folder / NAMES[0]).unlink(missing_ok=True)
        save(adapter, self.folder, overwrite=True)
        with place(self.target), disk_errors():
            tidy(self.target)
            if os.path.lexists(self.target) and not read_json(self.folder / RUN).get(REPLACES):
                raise OptionError("has appeared meanwhile", fix=f"the finished run is {self.folder}: move it")
            # Checked again: files may have been added while the run lasted.
            if strangers := _strangers(self.target):
                what = f"holds files that no run wrote, which would be lost: {some(strangers)}"
                raise OptionError(what, fix=f"move it elsewhere; the finished run is {self.folder}")
            keep_mode(self.target, self.folder)
            # Windows cannot rename over a folder, and no system over one that is not empty.
            with move_aside(self.target):
                self.folder.rename(self.target)
        self.release()

    def release(self) -> None:
        """Release the folder, so that another process can resume the run."""
        self._hold.release()

    @property
    def snapshots(self) -> list[tuple[int, Path]]:
        """The steps and folders of the snapshots, in order of steps."""
        folders = [(path.name.rpartition("-")[2], path) for path in self.folder.glob("checkpoint-*")]
        return sorted((int(step), path) for step, path in folders if step.isdecimal())

    @property
    def has_state(self) -> bool:
        """Whether there is a state from which the run can be resumed."""
        return (self.folder / STATE).exists()

    def _state(self, folder: Path | None = None) -> State | None:
        path = (folder or self.folder) / STATE
        if not path.exists():
            return None
        stored = read_safetensors(path)
        with place(path):
            try:
                content = parse_json((stored.metadata or {})[KEY])
                step, record, run = content["step"], dict(content["record"]), dict(content["run"])
                if type(step) is not int:
                    raise TypeError(step)
            except (KeyError, ValueError, TypeError) as error:
                raise FormatError("holds no state of a training run", fix="begin anew: --overwrite") from error
            return State(step, {name: tensor.read() for name, tensor in stored.tensors.items()}, record, run)

    def _cut(self, step: int) -> None:
        """Remove the lines of the logs and the snapshots that came after a step."""
        for name in (LOG, WATCHED):
            if (self.folder / name).exists():
                entries = _objects(self.folder / name)
                # The first line of a watcher's log describes the modules.
                kept = [e for e in entries if "watch" in e or (type(e.get("step")) is int and e["step"] <= step)]
                text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept)
                self._write(name, text)
        # The resumed run will write these snapshots again, and they may differ.
        for at, snapshot in self.snapshots:
            if at > step:
                shutil.rmtree(snapshot, ignore_errors=True)

    def _write(self, name: str, text: str) -> None:
        with atomic_file(self.folder / name) as file:
            file.write(text.encode())


def grid_record(folder: Path) -> dict[str, Any] | None:
    """What a grid has recorded of its run in a folder, with its ``settings``; None if the run is not one of a grid."""
    record = None
    # A folder whose record is damaged is not recognised, and so never replaced.
    with suppress(FormatError):
        record = read_json(folder / RUN).get(GRID) if (folder / RUN).is_file() else None
    return record if isinstance(record, dict) and isinstance(record.get("settings"), dict) else None


def grid_runs(folder: Path) -> list[Path]:
    """The folders of the runs of a grid, finished or not, in the natural order of their names; else an empty list."""
    runs = sorted(folder.glob(f"*/{RUN}"), key=lambda path: natural_key(path.parent.name)) if folder.is_dir() else []
    return [path.parent for path in runs if grid_record(path.parent) is not None]


def is_finished(run: Path) -> bool:
    """Whether a folder is that of a finished run."""
    return not run.name.endswith(UNFINISHED) and (run / RUN).exists() and (run / NAMES[0]).exists()


def _ours(folder: Path) -> bool:
    """Whether a folder holds a run, or holds nothing yet because a run was killed at its very beginning."""
    return (folder / RUN).exists() or all(inside.name.endswith(".part") for inside in folder.iterdir())


def _strangers(folder: Path) -> list[str]:
    """The files in the folder of a run that loralens did not write."""
    strangers = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if not _OWN.fullmatch(name) and not (name.endswith(".part") and path.name.startswith(".")):
            strangers.append(name)
    return strangers


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "…"


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
    return [entry for entry in _objects(path) if type(entry.get("step")) is int]


def _objects(path: Path) -> list[dict[str, Any]]:
    """The objects in the lines of a log; lines that a kill cut off are none."""
    text = read_whole(path).decode(errors="replace") if os.path.lexists(path) else ""
    return [entry for line in text.split("\n") if isinstance(entry := json_or_none(line), dict)]


VERSION = 1
MOST_VALUES = 1 << 16  # most singular values of a module; ranks are far smaller
FIX = "give the log that a Watcher or a callback of loralens.watching wrote"


class LoggedModule(NamedTuple):
    """A module at a snapshot: its singular values, largest first, and the other measures as they are in the log."""

    s: Array
    shape: tuple[int, int]
    rank: int
    measures: Mapping[str, Any]


class LoggedSnapshot(NamedTuple):
    """One snapshot: the steps done, the modules by name, the measures of the whole adapter, and the warnings.

    Loss and gradient norm are means since the snapshot before, and None where the watcher did not know them.
    """

    step: int
    modules: Mapping[str, LoggedModule]
    total: Mapping[str, Any]
    warnings: tuple[Mapping[str, Any], ...]
    loss: float | None = None
    gradient_norm: float | None = None


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
        _add_line(self.path, record)


def _add_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add an object to a log, one line at a time, so that a kill cuts off the last line at most."""
    with disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def is_watch_log(path: Path) -> bool:
    """Whether a file looks like the log of a watched run, judged by its name and its first bytes."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with open_stream(path) as file:
        return file.read(32).lstrip().startswith(b'{"watch"')


def read_watch_log(path: Path) -> list[LoggedSnapshot]:
    """The snapshots of a log in order of steps. Of two with the same step the later counts: a resumed run wrote it.

    Lines that were cut off when a run was killed are left out.

    Raises
    ------
    FormatError
        The file is not such a log, is of a later version, or its numbers contradict each other.
    """
    with place(path):
        entries = _objects(path)
        if not entries or not isinstance(entries[0].get("watch"), int):
            raise FormatError("is not the log of a watched run", fix=FIX)
        if entries[0]["watch"] > VERSION:
            raise FormatError(
                f"is a log of version {entries[0]['watch']!a:.20}, and this release reads {VERSION}",
                fix="update loralens",
            )
        described = _shapes_and_ranks(entries[0].get("modules"))
        snapshots = {
            snapshot.step: snapshot for entry in entries[1:] if (snapshot := _snapshot(entry, described)) is not None
        }
    return [snapshots[step] for step in sorted(snapshots)]


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


def _snapshot(entry: Mapping[str, Any], described: Mapping[str, tuple[tuple[int, int], int]]) -> LoggedSnapshot | None:
    """One snapshot; None for a line of another kind."""
    step, modules = entry.get("step"), entry.get("modules")
    if type(step) is not int or not 0 <= step < 2**63 or not isinstance(modules, dict):
        return None
    logged = {}
    for name, measures in modules.items():
        if name not in described or not isinstance(measures, dict):
            raise FormatError(f"step {step} has a module that its first line does not name: {name!a:.80}", fix=FIX)
        logged[name] = LoggedModule(_singular_values(step, name, measures.get("s")), *described[name], measures)
    total, warnings = entry.get("total"), entry.get("warnings")
    return LoggedSnapshot(
        step,
        logged,
        total if isinstance(total, dict) else {},
        tuple(warning for warning in warnings if _is_warning(warning)) if isinstance(warnings, list) else (),
        finite_number(entry.get("loss")),
        finite_number(entry.get("gradient_norm")),
    )


def _singular_values(step: int, name: str, values: Any) -> Array:
    numbers = [finite_number(value) for value in values] if isinstance(values, list) else [None]
    s = np.array([number for number in numbers if number is not None and isfinite(number)], dtype=np.float64)
    if len(s) < len(numbers) or len(s) > MOST_VALUES or (s < 0).any() or (np.diff(s) > 0).any():
        raise FormatError(f"step {step}: the singular values of {name} are not numbers that fall", fix=FIX)
    return s


def _is_warning(warning: Any) -> bool:
    return isinstance(warning, dict) and all(is_safe_text(warning.get(key)) for key in ("code", "text", "fix"))


# written by transformers' Trainer into every checkpoint
TRAINER_STATE = "trainer_state.json"

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
    return (path if path.is_dir() else path.parent) / TRAINER_STATE


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
        return find_adapter(path).file.name if path.is_dir() else ""
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
