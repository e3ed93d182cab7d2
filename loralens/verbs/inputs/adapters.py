"""Adapters as inputs of a verb: paths or objects, the options of reading them, and their labels in messages."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict

from loralens.core.adapter import Adapter
from loralens.core.carried import magnitudes
from loralens.core.messages import command_line, tell_findings
from loralens.errors import OptionError
from loralens.formats import load

AdapterSource = str | PathLike[str] | Adapter
Source = AdapterSource | Sequence[AdapterSource]

# Codes of findings about what is kept and not measured: of magnitudes, and of differences and weights in full.
DORA, DIFFERENCES = "use-dora", frozenset({"full-difference", "bias-difference", "set-weight"})


class Reading(TypedDict, total=False):
    """How a file is read, where it does not say it itself: options of every verb that reads adapters.

    Attributes
    ----------
    format : str, optional
        The dialect of the file, where its content could be of several.
    alpha, scale : float, optional
        α (scale = α/r), or the scale, of a file that does not say it.
    allow_pickle : bool
        Read ``.bin`` and ``.pt`` files, with an unpickler that builds nothing but tensors.
    once : bool
        Add the update of the ``out_proj`` of an `nn.MultiheadAttention` once; PEFT adds it twice.
    """

    format: str | None
    alpha: float | None
    scale: float | None
    allow_pickle: bool
    once: bool


# Written out, as a TypedDict has no defaults of its own.
READING = Reading(format=None, alpha=None, scale=None, allow_pickle=False, once=False)  # the defaults


def sources(adapters: Sequence[Source]) -> list[AdapterSource]:
    """The adapters of ``verb(a, b)``, ``verb([a, b])`` and ``verb("a")``, one after the other.

    Raises
    ------
    OptionError
        There is none, or something is neither a path nor an adapter.
    """
    flat: list[AdapterSource] = []
    for source in adapters:
        if isinstance(source, list | tuple):
            flat += source
        else:
            flat.append(source)  # type: ignore[arg-type]  # what is no adapter is refused below
    for source in flat:
        if not isinstance(source, str | PathLike | Adapter):
            raise OptionError(f"{source!r} is no adapter", fix="give a path, or what loralens.load returns")
    if not flat:
        raise OptionError("there is no adapter", fix="give one or several: paths, or what loralens.load returns")
    return flat


def labels(adapters: Sequence[AdapterSource]) -> list[str]:
    """What adapters are called: by their paths; objects by their place where there are several."""
    return [
        (f"adapter {i}" if len(adapters) > 1 else "adapter") if isinstance(source, Adapter) else str(source)
        for i, source in enumerate(adapters, start=1)
    ]


def short_labels(paths: Sequence[str]) -> list[str]:
    """The paths without the folders that all of them share; each different."""
    parts = [Path(path).parts for path in paths]
    shared = 0
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
    strict: bool = True,
    label: str = "adapter",
) -> Adapter:
    """The adapter that a verb was given, read beside the base or model where there is one.

    Messages say what the reader noticed, and where the base is another than the one that the adapter names.

    Parameters
    ----------
    source : path or Adapter
    reading : Reading
    base : path, optional
    applies_all : bool
        The verb applies all that the adapter carries, magnitudes of DoRA and full differences too, so that no message
        is true that says what is left out of ΔW.
    strict : bool
        Refuse a file whose numbers would be wrong; else that is a finding.
    label : str
        What an object is called.

    Raises
    ------
    FormatError
        The file cannot be read as an adapter.
    OptionError
        Options of reading with an adapter that has been read.
    """
    path = label if isinstance(source, Adapter) else str(source)
    if isinstance(source, Adapter):
        check_unread(reading)
        adapter = source
    else:
        adapter = load(path, base=base, strict=strict, **reading)
    if base is not None:
        from loralens.verbs.inputs.bases import warn_of_base  # reading a base takes as long to import as NumPy

        warn_of_base(path, adapter, base)
    if isinstance(source, Adapter):
        return adapter
    applied = DIFFERENCES | ({DORA} if magnitudes(adapter) else set()) if applies_all else frozenset()
    tell_findings(path, adapter.findings, without=applied)
    return adapter


def check_unread(reading: Reading) -> None:
    """Refuse options of reading for an adapter that has been read."""
    for name, value in stated_options(reading).items():
        raise OptionError(
            f"{name}={value!r} says how a file is read, and the adapter has been read",
            fix=f"give a path, or {name} to loralens.load",
        )


def stated_options(reading: Reading) -> dict[str, Any]:
    """The options of reading that do not have their default.

    Raises
    ------
    TypeError
        Something that is no such option, as of any other function that is called wrongly.
    """
    unknown = [name for name in reading if name not in READING]
    if unknown:
        raise TypeError(f"got an unexpected keyword argument {unknown[0]!r}")
    return {name: value for name, value in reading.items() if value is not None and value is not False}


def read_where_unknown(source: AdapterSource, reading: Reading, *, base: str | PathLike[str] | None = None) -> Adapter:
    """The same, ``alpha`` and ``scale`` counting only where the file does not say its own; without messages."""
    if isinstance(source, Adapter):
        stated_options(reading)  # which refuses what is no option
        return source
    # First without them: whether the file states its own scale is known only after reading it.
    unscaled: Reading = {**reading, "alpha": None, "scale": None}
    adapter = load(str(source), base=base, **unscaled)
    stated = any(module.scaling.stated for module in adapter.modules.values())
    return adapter if stated else load(str(source), base=base, **reading)


def command_line_options(reading: Mapping[str, Any]) -> str:
    """The options of reading that were given, as a user types them, to be repeated in another command."""
    words: list[str] = []
    for name, value in reading.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return command_line(*words)


def path_of(source: AdapterSource) -> Path | None:
    """Where the adapter was read from; None of an object."""
    return None if isinstance(source, Adapter) else Path(source)
