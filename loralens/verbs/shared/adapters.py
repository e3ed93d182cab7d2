"""Adapters as inputs of a verb: paths or objects, the options of reading them, and their labels in messages."""

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import cast

from loralens.core.adapter import Adapter
from loralens.core.messages import command_line, tell_findings
from loralens.core.together import magnitudes
from loralens.errors import LoraLensError, OptionError
from loralens.formats import load
from loralens.formats.files.location import SUFFIXES, find_adapter
from loralens.formats.records.training import grid_runs, is_finished, read_run
from loralens.verbs.shared.options import Reading

AdapterSource = str | PathLike[str] | Adapter
Source = AdapterSource | Sequence[AdapterSource]

# Codes of findings that say what an adapter carries besides ΔW: DoRA's magnitudes, and differences and weights in full.
# A verb that applies these too must not say that they are left out.
DORA, DIFFERENCES = "use-dora", frozenset({"full-difference", "bias-difference", "set-weight"})


def sources(adapters: Sequence[Source]) -> list[AdapterSource]:
    """The adapters of ``verb(a, b)``, ``verb([a, b])`` and ``verb("a")`` as one list.

    Raises
    ------
    OptionError
        There is no adapter, or an argument is neither a path nor an adapter.
    """
    flat: list[AdapterSource] = []
    for source in adapters:
        # Lists and tuples only, as a path that is a string is a sequence too.
        if isinstance(source, list | tuple):
            flat += source
        else:
            flat.append(source)  # type: ignore[arg-type]  # what is not an adapter is refused below
    for source in flat:
        if not isinstance(source, str | PathLike | Adapter):
            # The repr of an array has several lines, and an error message has one.
            shown = " ".join(f"{source!r:.200}".split())
            raise OptionError(f"{shown} is not an adapter", fix="give a path, or what loralens.load returns")
    if not flat:
        raise OptionError("no adapter is given", fix="give one or several: paths, or what loralens.load returns")
    return flat


def find_source(source: Source) -> AdapterSource:
    """The one adapter that a verb was given, with its file found once for all that the verb does with it."""
    return source if isinstance(source, Adapter) else find_adapter(cast("str | PathLike[str]", source))


def labels(adapters: Sequence[AdapterSource]) -> list[str]:
    """The labels of adapters in messages and tables: their paths; objects are numbered if there are several."""
    # They are counted from 1, as people count arguments.
    return [
        (f"adapter {i}" if len(adapters) > 1 else "adapter") if isinstance(source, Adapter) else str(source)
        for i, source in enumerate(adapters, start=1)
    ]


def short_labels(paths: Sequence[str]) -> list[str]:
    """The paths without the folders that all of them share; numbers tell apart paths that were given twice."""
    parts = [Path(path).parts for path in paths]
    shared = 0
    # The last part stays, even where all paths are equal.
    while all(len(names) > shared + 1 for names in parts) and len({names[shared] for names in parts}) == 1:
        shared += 1
    short = [str(Path(*names[shared:])) for names in parts]
    return short if len(set(short)) == len(short) else [f"{name} ({i})" for i, name in enumerate(short, start=1)]


def read_adapter(
    source: AdapterSource,
    reading: Reading,
    *,
    base: str | PathLike[str] | None = None,
    applies_all: bool = False,
    label: str = "adapter",
) -> Adapter:
    """Read the adapter that a verb was given, with messages.

    Messages say what the reader noticed, and warn if ``base`` is not the base that the adapter names.

    Parameters
    ----------
    source : path or Adapter
    reading : Reading
    base : path, optional
        The base model, or the model that will carry the adapter.
    applies_all : bool
        The verb applies everything that the adapter carries, DoRA's magnitudes and full differences too. Messages that
        these are left out of ΔW would be wrong, and are not given.
    label : str
        The label of an object in messages.

    Raises
    ------
    FormatError
        The file cannot be read as an adapter.
    OptionError
        An option of ``reading`` was given for an adapter that has already been read.
    """
    adapter = load_source(source, reading, base=base, strict=True)
    path = label if isinstance(source, Adapter) else str(source)
    if base is not None:
        from loralens.verbs.shared.base_reading import warn_of_base  # reading a base takes as long to import as NumPy

        warn_of_base(path, adapter, base)
    # The findings about an object were told when it was read.
    if not isinstance(source, Adapter):
        applied = DIFFERENCES | ({DORA} if magnitudes(adapter) else set()) if applies_all else frozenset()
        tell_findings(path, adapter.findings, without=applied)
    return adapter


def load_source(
    source: AdapterSource, reading: Reading, *, base: str | PathLike[str] | None = None, strict: bool
) -> Adapter:
    """Read the adapter that a verb was given, without messages.

    If ``strict`` is false, an adapter whose numbers would be wrong is not refused: its findings say so.
    """
    if isinstance(source, Adapter):
        check_unread(reading)
        return source
    return load(source, base=base, strict=strict, **reading.stated)


def check_unread(reading: Reading) -> None:
    """Refuse options of reading for an adapter that has already been read.

    They would have no effect, although a caller who gives them expects one.
    """
    for name, value in reading.stated.items():
        raise OptionError(
            f"{name}={value!r} says how to read a file, and this adapter was already read",
            fix=f"give a path, or {name} to loralens.load",
        )


def read_where_unknown(source: AdapterSource, reading: Reading, *, base: str | PathLike[str] | None = None) -> Adapter:
    """Read an adapter without messages; ``alpha`` and ``scale`` apply only if the file does not state its own.

    Some of several adapters may be objects, to which the options do not apply, so this is not an error here.
    """
    if isinstance(source, Adapter):
        return source
    # First without them: whether the file states its own scale is known only after reading it.
    unscaled = replace(reading, alpha=None, scale=None)
    source = find_adapter(source)
    adapter = load(source, base=base, **unscaled.stated)
    stated = any(module.scaling.stated for module in adapter.modules.values())
    return adapter if stated else load(source, base=base, **reading.stated)


def command_line_options(reading: Reading) -> str:
    """The options of reading that were given, as a user types them in another command."""
    words: list[str] = []
    for name, value in reading.stated.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]  # a flag has no value
    return command_line(*words)


def path_of(source: AdapterSource) -> Path | None:
    """The path of an adapter; None if it is an object."""
    return None if isinstance(source, Adapter) else Path(source)


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
        return (path.is_dir() or path.suffix in SUFFIXES) and bool(find_adapter(path))
    except LoraLensError:
        return False
