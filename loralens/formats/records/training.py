"""The files of a run of ``loralens train``, while it runs and when it is finished.

While it runs, it is a folder beside its target, ``OUT.unfinished``, with

==================== ===============================================================================================
``run.json``         the description of the run: everything that must be the same to resume it
``log.jsonl``        one object on each line: steps and evaluations
``watch.jsonl``      the looks of a watcher (`loralens.formats.records.watch_log`)
``state.safetensors`` the latest state, from which the run is resumed
``checkpoint-N/``    snapshots of the adapter
==================== ===============================================================================================

At its end the adapter is written beside these, and the folder takes the name of the target. So a target is a finished
run or does not exist. The state stays, so that the run can go on with more steps. The process that writes holds a lock
on the folder, so that a second one is refused.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from loralens.core.adapter import Adapter
from loralens.core.lazy import LazyArray
from loralens.core.names import natural_key, some
from loralens.core.stored import State, parse_json
from loralens.errors import FormatError, MismatchError, OptionError, place
from loralens.formats import save
from loralens.formats.files.atomic import atomic_file, move_aside
from loralens.formats.files.container import CONFIG, Stored, read_json, read_safetensors
from loralens.formats.files.disk import check_room, disk_errors
from loralens.formats.files.hold import Hold, check_free
from loralens.formats.files.leftovers import is_moved_aside, keep_mode, remove, tidy
from loralens.formats.files.location import NAMES, SUFFIXES
from loralens.formats.files.writing import write_safetensors
from loralens.formats.records.training_log import log_entries
from loralens.formats.records.watch_log import NAME as WATCHED
from loralens.formats.records.watch_log import cut_watch_log

KEY = "loralens.training"  # the key in the metadata of a state
RUN, LOG, STATE = "run.json", "log.jsonl", "state.safetensors"
UNFINISHED = ".unfinished"  # the suffix of the folder of a run that is not finished
_OWN = re.compile(rf"{RUN}|{LOG}|{WATCHED}|{STATE}|(checkpoint-[0-9]+/)?({NAMES[0]}|{CONFIG})")  # the files of a run
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
            fix = f"give {target.with_suffix('')}; loralens convert makes a file of what is in it"
            raise OptionError(f"{target}: a run is a folder, not a {target.suffix} file", fix=fix)
        self.target = target
        self.folder = target.with_name(target.name + UNFINISHED)
        self._hold = Hold()

    def begin(self, run: Mapping[str, Any], *, overwrite: bool) -> None:
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

    def check(self, *, overwrite: bool) -> None:
        """Raise the errors that `begin` would raise, and change nothing."""
        # Each of these cases has another remedy, so each has a message of its own.
        for folder in (self.target, self.folder):
            if folder.exists() and not folder.is_dir():
                raise OptionError(f"{folder}: is a file, but a run is a folder", fix="choose another target")
            if folder.exists() and overwrite and not _ours(folder):
                what = f"{folder}: holds no training run, so it is not replaced"
                raise OptionError(what, fix="choose another target")
            if folder.exists() and overwrite and (strangers := _strangers(folder)):
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
            raise OptionError(what, fix="go on with it: --resume; or begin anew: --overwrite")
        if (self.target.exists() or is_moved_aside(self.target)) and not overwrite:
            raise OptionError(f"{self.target}: exists", fix="choose another target, or give --overwrite")
        if self.folder.exists() and not _ours(self.folder):
            raise OptionError(f"{self.folder}: is in the way, and holds no training run", fix="choose another target")
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
        raise OptionError(f"{self.target}: there is no run that could go on", fix="leave out --more-steps")

    def extend(self, run: Mapping[str, Any]) -> State:
        """Make a finished run an unfinished one with more steps; returns the state after its last step.

        Raises
        ------
        OptionError
            There is no finished run, or it has no state of its last step; or an unfinished run is in the way.
        MismatchError
            It is a run with other options. The message names the differences. Nothing has been changed.
        """
        if (self.folder / RUN).exists():
            raise OptionError(f"{self.folder}: holds an unfinished run", fix="go on with it: add --resume")
        steps = self.steps()
        with place(self.target), disk_errors():
            self._check_same({**run, "steps": steps}, self.target)
            state = self._state(self.target)
            if state is None or state.step != steps:
                what = "has no state of its last step (older releases removed it, and --patience may end before it)"
                raise OptionError(what, fix="begin a new run with its adapter: --start-from")
            self.target.rename(self.folder)
        with place(self.folder), disk_errors():
            self._hold.take(self.folder)
            self._write(RUN, json.dumps({**run, REPLACES: False}, indent=2) + "\n")
        return state

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
            fix = "go on with the same options, or --overwrite it"
            raise MismatchError(f"holds another run: {differences}", fix=fix)

    def log(self, record: Mapping[str, Any]) -> None:
        """Add a line to the log."""
        with disk_errors(self.folder / LOG), (self.folder / LOG).open("a", encoding="utf-8") as file:
            # One line at a time, so a kill cuts off the last line at most.
            file.write(json.dumps(record) + "\n")

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
        path = self.folder / LOG
        if path.exists():
            remaining = [entry for entry in log_entries(path) if entry["step"] <= step]
            self._write(LOG, "".join(f"{json.dumps(entry)}\n" for entry in remaining))
        watched = self.folder / WATCHED
        if watched.exists():
            self._write(WATCHED, cut_watch_log(watched, step))
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
