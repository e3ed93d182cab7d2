"""The folder of a run as an input of a verb: it stands for the checkpoints in it."""

from collections.abc import Sequence
from pathlib import Path

from loralens.core.adapter import Adapter
from loralens.core.messages import command_line
from loralens.errors import LoraLensError, OptionError
from loralens.formats.files.location import SUFFIXES, adapter_file
from loralens.formats.records.runs import read_run
from loralens.verbs.inputs.adapters import AdapterSource

SHOWN = 3  # adapters of a folder that a message names


def with_checkpoints(adapters: Sequence[AdapterSource]) -> list[AdapterSource]:
    """The adapters, each path once, and the checkpoints of a run in place of its folder.

    Raises
    ------
    OptionError
        A folder of several adapters that is no run.
    """
    members: dict[object, AdapterSource] = {}
    for source in adapters:
        if isinstance(source, Adapter):
            members[id(source)] = source
        else:
            members |= {path: path for path in _checkpoints(str(source))}
    return list(members.values())


def _checkpoints(path: str) -> list[str]:
    """The checkpoints of a run's folder; of anything else the path itself."""
    folder = Path(path)
    if not folder.is_dir() or _is_adapter(folder):
        return [path]
    try:
        return [str(checkpoint.path) for checkpoint in read_run([folder]).checkpoints]
    except LoraLensError:
        adapters = sorted(entry for entry in folder.iterdir() if _is_adapter(entry))
    if len(adapters) < 2:
        return [path]
    listed = command_line(*map(str, adapters[:SHOWN])) + (" …" if len(adapters) > SHOWN else "")
    raise OptionError(
        f"{path}: is no run, and holds {len(adapters)} adapters", fix=f"give each: loralens report {listed}"
    )


def _is_adapter(path: Path) -> bool:
    try:
        return (path.is_dir() or path.suffix in SUFFIXES) and bool(adapter_file(path))
    except LoraLensError:
        return False
