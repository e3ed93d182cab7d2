"""A training run of our own on disk, while it lasts and when it is done.

While it lasts it is a folder beside its target, ``OUT.unfinished``, with

==================== ===============================================================================================
``run.json``         what the run is: everything that must be the same for it to go on
``log.jsonl``        one object a line: steps, evaluations, live spectra
``state.safetensors`` what it goes on from, the latest only
``checkpoint-N/``    snapshots: adapters
==================== ===============================================================================================

When it is done the adapter is written beside these, the folder takes its target's name, and the state is removed: so a
target is a finished run or not there. The process that writes holds the folder, so that a second one is refused.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from loralens.core.adapter import Adapter
from loralens.core.lazy import LazyArray
from loralens.core.names import some
from loralens.core.training import State
from loralens.errors import FormatError, MismatchError, OptionError, place
from loralens.formats import save
from loralens.formats.files.appearing import move_aside
from loralens.formats.files.container import CONFIG, Stored, read_json, read_safetensors
from loralens.formats.files.disk import check_room, disk
from loralens.formats.files.hold import Hold, check_free
from loralens.formats.files.leftovers import is_moved_aside, remove, tidy
from loralens.formats.files.location import NAMES, SUFFIXES
from loralens.formats.files.replacing import replacing
from loralens.formats.files.writing import write_safetensors

KEY = "loralens.training"  # of the metadata of a state
RUN, LOG, STATE = "run.json", "log.jsonl", "state.safetensors"
_OWN = re.compile(rf"{RUN}|{LOG}|{STATE}|(checkpoint-[0-9]+/)?({NAMES[0]}|{CONFIG})")  # the files of a run
REPLACES = "replaces"  # of run.json: whether the run takes the place of what its target is


@final
class Training:
    """The files of one run.

    Parameters
    ----------
    target : Path
        Where the finished run will be.

    Raises
    ------
    OptionError
        The target has no name of its own, as ``.`` and ``/`` have none, or that of a file of weights.
    """

    def __init__(self, target: Path) -> None:
        if target.name in ("", ".."):
            raise OptionError(f"{target}: is no name for a run", fix="give a folder that is not there yet")
        if target.suffix in SUFFIXES:
            raise OptionError(
                f"{target}: a run is a folder, not a {target.suffix} file",
                fix=f"give {target.with_suffix('')}; loralens convert makes a file of what is in it",
            )
        self.target = target
        self.folder = target.with_name(f"{target.name}.unfinished")
        self._hold = Hold()

    def begin(self, run: Mapping[str, Any], *, overwrite: bool) -> None:
        """Make the folder of a new run.

        Raises
        ------
        OptionError
            The target or an unfinished run of that name exists, and ``overwrite`` is false; or is none of ours; or
            another process is at it.
        """
        with place(self.target), disk():
            tidy(self.target)  # what a run had moved aside as it was killed is there again
        self.check(overwrite=overwrite)
        with place(self.folder), disk():
            if self.folder.exists():
                self._hold.take(self.folder)
                shutil.rmtree(self.folder)
                self._hold.release()
            self.folder.mkdir(parents=True)
            self._hold.take(self.folder)
        self._write(RUN, json.dumps({**run, REPLACES: overwrite}, indent=2, sort_keys=True) + "\n")

    def check(self, *, overwrite: bool) -> None:
        """Refuse what `begin` would refuse."""
        for folder in (self.target, self.folder):
            if folder.exists() and not folder.is_dir():
                raise OptionError(f"{folder}: is a file, and a run is a folder", fix="choose another target")
            if folder.exists() and overwrite and not _ours(folder):
                raise OptionError(
                    f"{folder}: holds no training run, so it is not replaced", fix="choose another target"
                )
            if folder.exists() and overwrite and (strangers := _strangers(folder)):
                raise OptionError(
                    f"{folder}: holds what no training run wrote, and would be lost: {some(strangers)}",
                    fix="move it elsewhere, or choose another target",
                )
        if self.folder.exists() and not self._hold.is_taken:
            check_free(self.folder)
        if (self.folder / RUN).exists() and not overwrite:
            raise OptionError(
                f"{self.folder}: holds an unfinished run{self._progress()}",
                fix="go on with it: --resume; or begin anew: --overwrite",
            )
        if (self.target.exists() or is_moved_aside(self.target)) and not overwrite:
            raise OptionError(f"{self.target}: exists", fix="choose another target, or give --overwrite")
        if self.folder.exists() and not _ours(self.folder):
            raise OptionError(f"{self.folder}: is in the way, and holds no training run", fix="choose another target")
        check_room(self.target)

    def go_on(self, run: Mapping[str, Any]) -> State | None:
        """The state to go on from, the log cut to it; None where none had been saved yet, so that it begins anew.

        Raises
        ------
        OptionError
            There is no unfinished run, or another process is at it.
        MismatchError
            It is another run: what differs is named.
        """
        if not (self.folder / RUN).exists():
            done = f"{self.target} is finished" if (self.target / RUN).exists() else f"{self.folder} is not there"
            raise OptionError(f"there is no run to go on with: {done}", fix="leave out --resume")
        self._hold.take(self.folder)
        with place(self.folder):
            saved_run = {name: value for name, value in read_json(self.folder / RUN).items() if name != REPLACES}
            this_run = json.loads(json.dumps(run))
            other = [name for name in {**saved_run, **this_run} if saved_run.get(name) != this_run.get(name)]
            if other:
                differences = "; ".join(
                    f"{n} is {_short(saved_run.get(n))} there, {_short(this_run.get(n))} here" for n in other[:3]
                )
                raise MismatchError(
                    f"holds another run: {differences}", fix="go on with the same options, or --overwrite it"
                )
            state = self._state()
        self._tidy()
        self._cut(state.step if state else -1)
        return state

    def log(self, record: Mapping[str, Any]) -> None:
        """Add a line to the log."""
        with disk(self.folder / LOG), (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def save(self, state: State) -> None:
        """Replace the state, whole or not at all."""
        record = {"step": state.step, "record": dict(state.record), "run": dict(state.run)}
        tensors = {name: LazyArray.of(array) for name, array in state.tensors.items()}
        write_safetensors(Stored(tensors, {KEY: json.dumps(record)}), self.folder / STATE)

    def snapshot(self, step: int, adapter: Adapter) -> Path:
        """Write the adapter as it is after a step."""
        path = self.folder / f"checkpoint-{step}"
        save(adapter, path, overwrite=True)
        return path

    def finish(self, adapter: Adapter) -> None:
        """Write the adapter, and give the folder its target's name; what `begin` was to replace is gone only then.

        Raises
        ------
        OptionError
            Something else has appeared there meanwhile. The finished run is kept where it is.
        """
        with place(self.folder), disk():
            (self.folder / NAMES[0]).unlink(missing_ok=True)  # of a run that was killed here: the same adapter
        save(adapter, self.folder, overwrite=True)
        with place(self.target), disk():
            tidy(self.target)
            if os.path.lexists(self.target) and not read_json(self.folder / RUN).get(REPLACES):
                raise OptionError("has appeared meanwhile", fix=f"the finished run is {self.folder}: move it")
            if strangers := _strangers(self.target):
                what = f"holds what no training run wrote, and would be lost: {some(strangers)}"
                raise OptionError(what, fix=f"move it elsewhere; the finished run is {self.folder}")
            with move_aside(self.target):
                self.folder.rename(self.target)
            (self.target / STATE).unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Let another process go on with it."""
        self._hold.release()

    @property
    def snapshots(self) -> list[tuple[int, Path]]:
        """The snapshots so far, with their steps and in their order."""
        folders = [(path.name.rpartition("-")[2], path) for path in self.folder.glob("checkpoint-*")]
        return sorted((int(step), path) for step, path in folders if step.isdecimal())

    @property
    def saved(self) -> bool:
        """Whether there is a state to go on from."""
        return (self.folder / STATE).exists()

    def _progress(self) -> str:
        try:
            state = self._state()
        except FormatError:
            return ""
        return f" that stopped after step {state.step}" if state else ""

    def _state(self) -> State | None:
        path = self.folder / STATE
        if not path.exists():
            return None
        stored = read_safetensors(path)
        with place(path):
            try:
                content = json.loads((stored.metadata or {})[KEY])
                step, record, run = int(content["step"]), dict(content["record"]), dict(content["run"])
            except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
                raise FormatError("holds no state of a training run", fix="begin anew: --overwrite") from error
            return State(step, {name: tensor.read() for name, tensor in stored.tensors.items()}, record, run)

    def _tidy(self) -> None:
        """Remove what a kill left half written."""
        for part in self.folder.glob(".*.part"):
            remove(part)

    def _cut(self, step: int) -> None:
        """Leave out of the log, and of the snapshots, what came after a step."""
        path = self.folder / LOG
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            remaining = [line for line in lines if (at := _step(line)) is not None and at <= step]
            self._write(LOG, "".join(f"{line}\n" for line in remaining))
        for at, snapshot in self.snapshots:
            if at > step:
                shutil.rmtree(snapshot, ignore_errors=True)

    def _write(self, name: str, text: str) -> None:
        with replacing(self.folder / name) as file:
            file.write(text.encode())


def _ours(folder: Path) -> bool:
    """Whether a folder holds a run; or nothing yet, where one was killed as it began."""
    return (folder / RUN).exists() or all(inside.name.endswith(".part") for inside in folder.iterdir())


def _strangers(folder: Path) -> list[str]:
    """What lies in the folder of a run and was not written by one."""
    strangers = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if not _OWN.fullmatch(name) and not (name.endswith(".part") and path.name.startswith(".")):
            strangers.append(name)
    return strangers


def _step(line: str) -> int | None:
    """The step of a line of the log; None where a kill has cut it short."""
    try:
        return int(json.loads(line)["step"])
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError):
        return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "…"
