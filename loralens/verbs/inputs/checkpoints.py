"""Folders of training as inputs of a verb: a run stands for its checkpoints, and a grid for its finished runs."""

from collections.abc import Sequence
from pathlib import Path

from loralens.core.adapter import Adapter
from loralens.core.messages import command_line
from loralens.errors import LoraLensError, OptionError
from loralens.formats.files.location import SUFFIXES, adapter_file
from loralens.formats.records.runs import read_run
from loralens.formats.records.training import grid_runs, is_finished
from loralens.verbs.inputs.adapters import AdapterSource

SHOWN = 3  # adapters of a folder that a message names


def with_grids(adapters: Sequence[AdapterSource]) -> list[AdapterSource]:
    """The adapters, with the finished runs of a grid in place of its folder.

    Raises
    ------
    OptionError
        No run of the grid is finished.
    """
    members: list[AdapterSource] = []
    for source in adapters:
        runs = [] if isinstance(source, Adapter) else grid_runs(Path(source))
        finished = [str(run) for run in runs if is_finished(run)]
        if runs and not finished:
            raise OptionError(f"{source}: no run of this grid is finished", fix="give the command of the grid again")
        members += finished or [source]
    return members


def with_checkpoints(adapters: Sequence[AdapterSource]) -> list[AdapterSource]:
    """The adapters, each of them once, with the checkpoints of a run, or the runs of a grid, in place of the folder.

    Raises
    ------
    OptionError
        A folder holds several adapters and is not a run.
    """
    # A dict keeps the order. An object has no path, so its identity stands for it.
    members: dict[object, AdapterSource] = {}
    for source in with_grids(adapters):
        if isinstance(source, Adapter):
            members[id(source)] = source
        else:
            members |= {path: path for path in _checkpoints(str(source))}
    return list(members.values())


def _checkpoints(path: str) -> list[str]:
    """The checkpoints of the folder of a run; of any other path the path itself."""
    folder = Path(path)
    # An adapter may lie in one folder with its checkpoints; then the adapter is meant.
    if not folder.is_dir() or _is_adapter(folder):
        return [path]
    try:
        return [str(checkpoint.path) for checkpoint in read_run([folder]).checkpoints]
    except LoraLensError:
        adapters = sorted(entry for entry in folder.iterdir() if _is_adapter(entry))
    # If the path is wrong, the reader reports it, because it knows more.
    if len(adapters) < 2:
        return [path]
    listed = command_line(*map(str, adapters[:SHOWN])) + (" …" if len(adapters) > SHOWN else "")
    raise OptionError(
        f"{path}: is not a training run, and holds {len(adapters)} adapters", fix=f"give each: loralens report {listed}"
    )


def _is_adapter(path: Path) -> bool:
    try:
        return (path.is_dir() or path.suffix in SUFFIXES) and bool(adapter_file(path))
    except LoraLensError:
        return False
