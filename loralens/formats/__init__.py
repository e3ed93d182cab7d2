"""Adapter files, in and out: the only room that touches the disk."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any, final

from loralens.core.adapter import Adapter
from loralens.core.lowrank import LowRank
from loralens.core.scaling import Scaling
from loralens.errors import FormatError, MismatchError, OptionError, place
from loralens.formats import peft, peft_writer
from loralens.formats.container import Stored, read_json, read_safetensors
from loralens.formats.location import adapter_file, config_beside, is_pickle
from loralens.formats.writing import write_file, write_folder


@final
@dataclass(frozen=True, slots=True)
class Format:
    """A dialect: a name, what it is called in words, whether a file is one, and a pair of pure functions."""

    name: str
    title: str
    detect: Callable[[Stored], bool]
    read: Callable[[Stored], Adapter]
    write: Callable[[Adapter], Stored] | None = None


FORMATS = (Format("peft", "Hugging Face PEFT", peft.detect, peft.read, peft_writer.write),)


def load(
    path: str | PathLike[str],
    *,
    alpha: float | None = None,
    scale: float | None = None,
    allow_pickle: bool = False,
    strict: bool = True,
) -> Adapter:
    """The adapter at ``path``, its numbers read when they are asked for.

    Parameters
    ----------
    path : path
        A file, a folder that holds one, or a Hub id (``org/name``) that the local cache holds.
    alpha, scale : float, optional
        For files that do not say: α (the scale is then α/r of each module) or the scale itself.
    allow_pickle : bool
        Read ``.bin`` and ``.pt`` files, by an unpickler that builds tensors and nothing else.
    strict : bool
        Raise what the reader found wrong enough to make the numbers wrong; else it stays in ``findings``.

    Raises
    ------
    FormatError, ShapeError, MismatchError, OptionError
        What is wrong, where, and how to fix it.
    """
    if alpha is not None and scale is not None:
        raise OptionError("alpha and scale exclude each other", fix="give one of them")
    for name, value in (("alpha", alpha), ("scale", scale)):
        if value is not None and not isfinite(value):
            raise OptionError(f"{name} is {value}, not a finite number", fix="give a finite number")
    file = adapter_file(Path(path))
    beside = config_beside(file)
    config = read_json(beside) if beside else None
    with place(file):
        if is_pickle(file):
            _check_pickle(config, allow_pickle=allow_pickle)
        stored = replace(_open(file), config=config)
        adapter = _rescaled(_read(stored), alpha, scale)
        for finding in adapter.findings:
            if strict and finding.level == "error":
                raise MismatchError(finding.text, fix=finding.fix)
    return adapter


def _open(file: Path) -> Stored:
    if not is_pickle(file):
        return read_safetensors(file)
    from loralens.formats.pickle import read_pickle

    tensors, plain = read_pickle(file)
    return Stored(tensors, plain=plain)


def _check_pickle(config: Mapping[str, Any] | None, *, allow_pickle: bool) -> None:
    if config and config.get("peft_type", "LORA") != "LORA":
        raise _not_lora(config["peft_type"])
    if not allow_pickle:
        raise FormatError(
            "is a pickle, which can run code where it is loaded",
            fix="give --allow-pickle (allow_pickle=True): loralens then reads the tensors and runs nothing",
        )


def _read(stored: Stored) -> Adapter:
    kind = (stored.config or {}).get("peft_type", "LORA")
    if kind != "LORA" and not any(form.detect(stored) for form in FORMATS):
        raise _not_lora(kind)
    return detect(stored).read(stored)


def save(
    adapter: Adapter,
    path: str | PathLike[str],
    *,
    format: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter: whole or not at all.

    Parameters
    ----------
    adapter : Adapter
    path : path
        A folder, or a file ending in ``.safetensors`` that gets its configuration beside it.
    format : str, optional
        A dialect that can be written; the adapter's own by default.
    overwrite : bool
        Replace what is there.

    Raises
    ------
    OptionError
        An unknown format, or one that is only read; a target that exists.
    FormatError
        What the format cannot hold, or a disk that cannot be written.
    """
    name = format or adapter.format
    writers = {form.name: form.write for form in FORMATS if form.write}
    if name not in writers:
        raise OptionError(f"{name!r} cannot be written", fix=f"choose one of {', '.join(writers)}")
    target = Path(path)
    with place(target):
        stored = writers[name](adapter)
    write = write_file if target.suffix == ".safetensors" else write_folder
    write(stored, target, overwrite=overwrite)


def _not_lora(kind: object) -> FormatError:
    said = ascii(kind)[:40] if isinstance(kind, str) else "of an unknown type"
    return FormatError(
        f"the configuration says that this is {said}, not a LoRA", fix="loralens reads LoRA adapters: A and B matrices"
    )


def detect(stored: Stored) -> Format:
    """The dialect of a file, by its content.

    Raises
    ------
    FormatError
        No dialect fits, or several do.
    """
    found = [form for form in FORMATS if form.detect(stored)]
    if len(found) == 1:
        return found[0]
    keys = ", ".join(list(stored.tensors)[:3]) or "no tensors at all"
    known = ", ".join(form.title for form in found or FORMATS)
    what = "could be any of" if found else "holds no LoRA pairs of any dialect known here:"
    raise FormatError(f"{what} {known}; its keys begin with {keys}", fix="check that this is an adapter, not a model")


def _rescaled(adapter: Adapter, alpha: float | None, scale: float | None) -> Adapter:
    """The adapter with the α or scale that its file does not say."""
    if alpha is None and scale is None:
        return adapter
    known = [name for name, module in adapter.items() if module.scaling.rule != "unknown"]
    if known:
        raise OptionError(
            f"the file says its own scale ({adapter[known[0]].scaling})", fix="leave out --alpha and --scale"
        )

    def given(module: LowRank) -> LowRank:
        if scale is not None:
            return module.rescaled(scale, Scaling("given", origin="--scale"))
        scaling = Scaling("alpha/r", alpha, module.rank, "--alpha")
        return module.rescaled(scaling.value, scaling)

    findings = tuple(finding for finding in adapter.findings if finding.code != "alpha-unknown")
    return replace(adapter.map(given), findings=findings)
