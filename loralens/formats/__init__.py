"""Reading and writing adapter files. Only this package accesses the disk."""

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import Scaling
from loralens.errors import FormatError, MismatchError, OptionError, place
from loralens.formats.dialects.table import FORMATS, GGUF, WRITTEN_WITH, Format, WriterOptions
from loralens.formats.files.container import (
    MANY_TENSORS,
    RECORD,
    Files,
    Stored,
    by_width,
    header_bytes,
    read_json,
    read_safetensors,
)
from loralens.formats.files.location import AdapterPaths, Container, find_adapter

if TYPE_CHECKING:
    from loralens.core.structured import Update


__all__ = ["FORMATS", "WRITTEN_WITH", "Format", "WriterOptions", "detect_format", "encode_adapter", "load", "save"]


def load(
    path: str | PathLike[str],
    *,
    format: str | None = None,
    alpha: float | None = None,
    scale: float | None = None,
    base: str | PathLike[str] | None = None,
    once: bool = False,
    strict: bool = True,
) -> Adapter:
    """Load the adapter at ``path``. Its numbers are read when they are first used.

    Parameters
    ----------
    path : path
        A file, a folder that holds one, or a Hub id (``org/name``) that the local cache holds.
    format : str, optional
        The dialect, for files whose content fits several.
    alpha, scale : float, optional
        For files that store no scale: α (the scale of each module is then α/r) or the scale itself.
    base : path, optional
        The folder of the base model. A GGUF adapter needs its numbers of heads to restore the order of the rows of q
        and k, and files that store the factors of convolutions flat need the kernels of its weights.
    once : bool
        Count the update of the out_proj of an ``nn.MultiheadAttention`` once. PEFT up to 0.21.2 adds it twice, in
        training too.
    strict : bool
        Raise an error for a finding of the reader that makes the numbers wrong; else it stays in ``findings``.

    Raises
    ------
    FormatError, ShapeError, MismatchError, OptionError
        What is wrong, where, and how to fix it.
    """
    _check_options(format, alpha, scale)
    # A folder or a Hub id becomes the one file that it means, which every message then names.
    found = find_adapter(path)
    file, container = found.file, found.container
    config = _read_config(found, base)
    with place(file):
        if container == "pickle":
            # The type comes first: whoever installs torch for an IA³ adapter would only meet the next error.
            check_peft_type(config)
        # Containers know nothing of configurations, which are files of their own.
        stored = replace(_read_stored(file, container), config=config)
        adapter = _rescale(_read_with_record(stored, file, container, format), alpha, scale)
        if once:
            adapter = adapter.map(lambda m: m.rescaled(m.scale / 2, m.scaling.once()) if m.scaling.twice else m)
        for finding in adapter.findings:
            if strict and finding.level == "error":
                raise MismatchError(finding.text, fix=finding.fix)
    # Only LyCORIS and some types of PEFT flatten kernels.
    if adapter.format == "lycoris" or (config or {}).get("peft_type") not in (None, "LORA"):
        from loralens.formats.dialects.lycoris import with_known_kernels

        adapter = with_known_kernels(adapter, base)
    return adapter


def _read_config(found: AdapterPaths, base: str | PathLike[str] | None) -> Mapping[str, Any] | None:
    """The configuration for an adapter: the one beside it, or for GGUF that of the base model."""
    if found.container == "gguf":
        from loralens.formats.models.checkpoint import model_config

        return model_config(Path(base)) if base else None
    return read_json(found.config) if found.config else None


def _read_with_record(stored: Stored, file: Path, container: Container, name: str | None) -> Adapter:
    """The adapter, with the names and scales of the record that loralens wrote if it converted the file."""
    # A pickle has no metadata: its record is a file of its own, which `record.read_record` looks for.
    if RECORD not in (stored.metadata or {}) and container != "pickle":
        return _read_dialect(stored, name)
    from loralens.formats.dialects import record

    conversion = record.read_record(stored, file)
    # The dialect that the user names comes first. A record may name one that this version does not have.
    form = name or record.format_of(conversion)
    return record.apply(_read_dialect(stored, form if form in {f.name for f in FORMATS} else None), conversion)


def _check_options(name: str | None, alpha: float | None, scale: float | None) -> None:
    if name is not None and name not in {form.name for form in FORMATS}:
        raise OptionError(f"{name!r} is not a format", fix=f"choose one of {', '.join(form.name for form in FORMATS)}")
    if alpha is not None and scale is not None:
        raise OptionError("alpha and scale exclude each other", fix="give one of them")
    for option, value in (("alpha", alpha), ("scale", scale)):
        if value is not None and not isfinite(value):
            raise OptionError(f"{option} is {value}, not a finite number", fix="give a finite number")


def _read_stored(file: Path, container: Container) -> Stored:
    if container == "gguf":
        from loralens.formats.files.gguf_file import read_gguf

        return read_gguf(file)
    # The first bytes decide, not the suffix: files are renamed, and safetensors files are called .bin, too.
    if container != "pickle":
        return read_safetensors(file)
    from loralens.formats.files.torch_pickle import read_pickle

    tensors, plain = read_pickle(file)
    return Stored(tensors, plain=plain)


def _read_dialect(stored: Stored, name: str | None) -> Adapter:
    if name is not None:
        adapter = next(form for form in FORMATS if form.name == name).read(stored)
        if not len(adapter):
            raise FormatError(f"nothing in it is of the dialect {name}", fix="leave out --format, or give another one")
        return adapter
    check_peft_type(stored.config)
    check_retired(stored.metadata)
    adapter = detect_format(stored).read(stored)
    check_peft_type(adapter.config)  # some readers take the configuration from the file's own header
    return adapter


def check_peft_type(config: Mapping[str, Any] | None) -> None:
    """Refuse an adapter whose PEFT configuration names a type whose update is not a sum, such as IA³.

    This happens before any dialect is tried, because the tensors of such an adapter may look like those of a dialect.
    """
    from loralens.formats.dialects.peft.types import TYPES

    # Other programs have no such field in their configurations.
    kind = (config or {}).get("peft_type")
    if kind is None or kind in TYPES:
        return
    named_type = ascii(kind)[:40] if isinstance(kind, str) else "of an unknown type"
    raise FormatError(
        f"the configuration says that this is {named_type}, not a LoRA",
        fix=f"loralens reads adapters whose update is a sum, of PEFT {', '.join(TYPES[:-1])} and {TYPES[-1]}; give "
        "--format NAME if the file is of another program and the configuration does not belong to it",
    )


# Key of the header metadata → what the file is, and the command that made an adapter of another dialect from it.
RETIRED = {
    "loralens-q": ("an adapter in the few bits of loralens-q", "convert FILE -o DIR --to peft"),
    "loralens_fleet": ("a compressed fleet", "fleet expand FILE NAME -o DIR"),
}


def check_retired(metadata: Mapping[str, str] | None) -> None:
    """Refuse a file that only an earlier loralens reads; the message says how that one converts it."""
    for key, (what, command) in RETIRED.items():
        if key in (metadata or {}):
            fix = f"convert it with the last commit that reads it, 31ab7467: loralens {command}"
            raise FormatError(f"is {what}, which loralens no longer reads", fix=fix)


def detect_format(stored: Stored) -> Format:
    """The dialect of the content of a file.

    PEFT is asked first and alone: its prefix, or its configuration beside its keys, is unambiguous.

    Raises
    ------
    FormatError
        No dialect fits, or several do.
    """
    if FORMATS[0].detect(stored):
        return FORMATS[0]
    matching = [form for form in FORMATS[1:] if form.detect(stored)]
    if len(matching) == 1:
        return matching[0]
    keys = ", ".join(list(stored.tensors)[:3]) or "none at all"  # three keys show the style of the names
    if matching:
        names = ", ".join(form.name for form in matching)
        raise FormatError(f"could be any of {names}; its keys begin with {keys}", fix="say which: --format NAME")
    what = f"holds no LoRA pairs of any dialect known here; its keys begin with {keys}"
    raise FormatError(what, fix="check that this is an adapter, not a model")


def _rescale(adapter: Adapter, alpha: float | None, scale: float | None) -> Adapter:
    """The adapter with an α or a scale that the user gives for a file that stores none."""
    if alpha is None and scale is None:
        return adapter

    def rescale(module: "Update") -> "Update":
        # An update that PEFT adds twice stays doubled: the user gives what the configuration would have said.
        if scale is not None:
            twice = module.scaling.twice
            scaling = Scaling("given", origin="--scale")
            return module.rescaled(scale * (1 + twice), scaling.doubled() if twice else scaling)
        # Fused projections have one block of r columns per slice, and α belongs to r, not to the width of all blocks.
        rank = module.scaling.rank or module.rank // module.layout.blocks
        scaling = Scaling("alpha/r", alpha, rank, "--alpha")
        scaling = scaling.doubled() if module.scaling.twice else scaling
        return module.rescaled(scaling.value, scaling)

    rescaled = adapter.map(rescale)
    # A scale that the file states is not overruled. It may be given again, as long as it is the same.
    for name, module in adapter.items():
        if module.scaling.stated and rescaled[name].scale != module.scale:
            raise OptionError(f"the file states its own scale ({module.scaling})", fix="leave out --alpha and --scale")
    # The findings about α say that it was unknown or assumed, which is no longer so.
    findings = tuple(finding for finding in adapter.findings if not finding.code.startswith("alpha-"))
    return replace(rescaled, findings=findings)


def save(
    adapter: Adapter,
    path: str | PathLike[str],
    *,
    format: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    **options: Unpack[WriterOptions],
) -> None:
    """Write an adapter. The files appear complete or not at all.

    Parameters
    ----------
    adapter : Adapter
    path : path
        A folder, or a file with the suffix of the format. A file gets its configuration beside it.
    format : str, optional
        A dialect that can be written; the adapter's own by default. A file of another dialect gets a record of names
        and scales in its metadata, which `load` reads back.
    overwrite : bool
        Replace an adapter that is there.
    dry_run : bool
        Check everything that can be checked, and write nothing.
    **options
        Options of the format: ``arch`` and ``base_config`` for GGUF, ``base_config`` for mlx.

    Raises
    ------
    OptionError
        The format is unknown or only read, or the target exists.
    FormatError, MismatchError
        The format cannot hold something of the adapter, or the disk cannot be written.
    """
    from loralens.formats.files.writing import write_files

    target = Path(path)
    with place(target):
        stored, files = encode_adapter(adapter, format, **options)
    write_files(stored, target, files=files, overwrite=overwrite, dry_run=dry_run)


def encode_adapter(
    adapter: Adapter, format: str | None = None, **options: Unpack[WriterOptions]
) -> tuple[Stored, Files]:
    """The tensors and header that `save` would write, and the files that they go to; no number is computed yet.

    Parameters and errors are those of `save`.
    """
    name = format or adapter.format
    writers = {form.name: form for form in FORMATS if form.writer}
    if name not in writers:
        raise OptionError(f"{name!r} cannot be written", fix=f"choose one of {', '.join(writers)}")
    form = writers[name]
    assert form.files
    # Only GGUF can store that the rows of q and k are in llama.cpp's order.
    if name != GGUF:
        from loralens.core.structured import check_rows  # imported here, as reading an adapter needs none of it

        check_rows(adapter.modules)
    if adapter.format != name:
        from loralens.formats.dialects.fitting import fit_to_dialect

        adapter = fit_to_dialect(name, adapter, base_config=options.get("base_config"), arch=options.get("arch"))
    # The writers would raise a TypeError for an option that they do not have; a message is better.
    misplaced = [option for option in options if name not in WRITTEN_WITH.get(option, (name,))]
    if misplaced:
        what = f"{name} has no option {misplaced[0]!r}"
        raise OptionError(what, fix=f"it is one of {', '.join(WRITTEN_WITH[misplaced[0]])}")
    stored = form.write(adapter, **options)
    # A header that is too long is refused before the tensors are read back and noted, which takes the most memory.
    if len(stored.tensors) > MANY_TENSORS and form.files.weights.endswith(".safetensors"):
        header_bytes(stored.tensors, stored.metadata)
    if adapter.format != name:
        from loralens.formats.dialects.fitting import carry_notes

        stored = carry_notes(name, adapter, stored)
    # A file in its own dialect says everything itself, unless the adapter came with a record that must go on.
    self_contained = adapter.format == name and not form.silent and RECORD not in (adapter.metadata or {})
    if not self_contained:
        from loralens.formats.dialects import record

        stored = record.stamp(stored, adapter, form.read(stored))
    return stored, form.files


def file_size(adapter: Adapter, format: str | None = None, **options: Unpack[WriterOptions]) -> int:
    """The exact size in bytes of the file of weights that `loralens.formats.save` would write.

    The configuration beside it is not counted. Parameters and errors are those of `save`.
    """
    return stored_size(*encode_adapter(adapter, format, **options))


def stored_size(stored: Stored, files: Files) -> int:
    """The size in bytes of the file of weights that ``stored`` would become."""
    suffix = Path(files.weights).suffix
    if suffix == ".gguf":
        return _gguf(stored)
    if suffix == ".bin":
        from loralens.formats.files.torch_pickle import write_torch  # few files are pickles

        # It is written with zeros, which take as many bytes as other numbers.
        zeros = {
            key: LazyArray.of(np.broadcast_to(np.zeros((), tensor.dtype), tensor.shape))
            for key, tensor in stored.tensors.items()
        }
        counted = _Counted()
        write_torch(zeros, counted)
        return counted.size
    numbers = sum(tensor.nbytes for tensor in stored.tensors.values())
    return len(header_bytes(by_width(stored.tensors.items()), stored.metadata)) + numbers


class _Counted:
    """A stream that counts the bytes that are written to it, and keeps none."""

    size = 0

    def write(self, data: bytes | memoryview) -> int:
        """Count ``data``."""
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing; torch calls it."""


def _gguf(stored: Stored) -> int:
    """The size of a GGUF file: header, key-values, entries of tensors, and the numbers padded to the alignment."""
    from loralens.formats.files import gguf_file as gguf_values  # few files are GGUF
    from loralens.formats.files.gguf_file import ALIGNMENT

    values = dict(gguf_values.from_text(key, text) for key, text in (stored.metadata or {}).items())
    stored_alignment = values.get("general.alignment")
    alignment = ALIGNMENT if stored_alignment is None else int(stored_alignment.value)
    # 24: magic (4), version (4) and two counts (8 each). A name has its length (8) before it. The entry of a tensor has
    # its number of axes (4), the axes (8 each), its type (4) and its offset (8).
    header = 24 + sum(8 + len(key.encode()) + gguf_values.value_size(value) for key, value in values.items())
    header += sum(8 + len(key.encode()) + 4 + 8 * tensor.ndim + 12 for key, tensor in stored.tensors.items())
    # The header is padded as well.
    parts = [header, *(tensor.nbytes for tensor in stored.tensors.values())]
    return sum(-(-part // alignment) * alignment for part in parts)


def __dir__() -> list[str]:
    """What is public: modules that this one imports are not."""
    return sorted(__all__)
