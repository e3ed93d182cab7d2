"""Recognising, reading and writing adapter files. Only this package accesses the disk."""

import re
from collections.abc import Mapping
from dataclasses import replace
from json import dumps
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any

from loralens.core.adapter import Adapter, Finding
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import Scaling
from loralens.core.model_in_memory import ModelPath
from loralens.core.names import WRAPPERS, some, without_wrappers
from loralens.core.stored import parse_json
from loralens.core.structured import Update, check_rows
from loralens.core.tensors import is_model, lazy_value
from loralens.errors import FormatError, MismatchError, OptionError, place
from loralens.exports import checks_keywords
from loralens.formats.dialects.dialect_table import FORMATS, GGUF, Format
from loralens.formats.dialects.pairs import SAVE_AGAIN
from loralens.formats.files.container import (
    MANY_TENSORS,
    RECORD,
    Files,
    Stored,
    by_width,
    header_bytes,
    read_json,
    read_safetensors,
    read_shards,
    with_digest,
)
from loralens.formats.files.location import EXPORT, INDEX, find_adapter
from loralens.formats.models.checkpoint import model_config, open_checkpoint
from loralens.tables.numbers import count

__all__ = ["FORMATS", "Format", "Stored", "detect_format", "encode_adapter", "load", "open_checkpoint", "save"]


NAMES = tuple(form.name for form in FORMATS)
STATE_DICT = "a state dict"  # the place of its errors


@checks_keywords
def load(
    path: str | PathLike[str] | Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    format: str | None = None,
    alpha: float | None = None,
    scale: float | None = None,
    base: ModelPath | None = None,
    once: bool = False,
    strict: bool = True,
) -> Adapter:
    """Load the adapter at ``path``, or in a state dict. Its numbers are read when they are first used.

    Parameters
    ----------
    path : path or mapping of str to tensor
        A file, a folder that holds one, or a Hub id (``org/name``) that the local cache holds; or the tensors
        themselves, of torch or NumPy, by their keys in a file.
    config : mapping or PeftConfig, optional
        Only for a state dict: the content of the configuration that would stand beside the file.
    format : str, optional
        The dialect, for files whose content fits several.
    alpha, scale : float, optional
        For files that store no scale: α (the scale of each module is then α/r) or the scale itself.
    base : path or model, optional
        The base model. A GGUF adapter needs its numbers of heads to restore the order of the rows of q
        and k, files that store the factors of convolutions flat need the kernels of its weights, and
        modules of torchtune and LitGPT get their names and rows in a base of Hugging Face.
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
    if format is not None and format not in NAMES:
        raise OptionError(f"{format!r} is not a format", fix=f"choose one of {', '.join(NAMES)}")
    if alpha is not None and scale is not None:
        raise OptionError("alpha and scale exclude each other", fix="give one of them")
    for option, value in (("alpha", alpha), ("scale", scale)):
        if value is not None and not isfinite(value):
            raise OptionError(f"{option} is {value}, not a finite number", fix="give a finite number")
    if isinstance(path, Mapping):
        with place(STATE_DICT):
            stored = _stored_in_memory(path, config)
            adapter = _read_dialect(stored, format, base)
            adapter = _with_options(adapter, alpha, scale, once=once, strict=strict)
        return replace(_with_kernels(adapter, stored.config, base), source=f"in memory: {STATE_DICT}")
    if is_model(path):
        what = f"{type(path).__name__} is a model, and not the path of an adapter"
        raise OptionError(what, fix="give loralens.live(model), or the model itself to a verb")
    if config is not None:
        raise OptionError("config goes with a state dict; a file has its own beside it", fix="leave config out")
    # A folder or a Hub id becomes the one file that it means, which every message then names.
    found = find_adapter(path)
    file, container = found.file, found.container
    config = read_json(found.config) if found.config else None
    if container == "gguf":
        from loralens.formats.files.gguf_file import read_gguf  # few adapters are GGUF

        # The configuration of a GGUF adapter is that of the base model.
        config = model_config(base) if base else None
    with place(file):
        # The first bytes decide, not the suffix: files are renamed, and safetensors files are called .bin, too.
        if container == "pickle":
            # The type comes first: whoever installs torch for an IA³ adapter would only meet the next error.
            check_peft_type(config)
            from loralens.formats.files.torch_pickle import read_pickle

            tensors, plain = read_pickle(file)
            stored = Stored(tensors, plain=plain)
        else:
            read_file = read_shards if file.name.endswith(INDEX) else read_safetensors
            stored = read_gguf(file) if container == "gguf" else read_file(file)
        # Containers know nothing of configurations, which are files of their own.
        plain_keys = _with_plain_keys(stored.tensors)
        renamed = [key for key in stored.tensors if key not in plain_keys]
        stored = replace(stored, tensors=plain_keys, config=config)
        # A pickle has no metadata: its record is a file of its own.
        if RECORD in (stored.metadata or {}) or container == "pickle":
            from loralens.formats.dialects import (
                conversion_record,
            )  # the names and scales of a file that loralens converted

            conversion = conversion_record.read_record(stored, file)
            # The dialect that the user names comes first. A record may name one that this version does not have.
            form = format or (conversion or {}).get("format")
            adapter = conversion_record.apply(_read_dialect(stored, form if form in NAMES else None, base), conversion)
        else:
            adapter = _read_dialect(stored, format, base)
        adapter = _with_options(adapter, alpha, scale, once=once, strict=strict)
    if renamed:
        text = f"{count(len(renamed), 'tensor')} had the names of a trainer and not of the model: {some(renamed, 1)}"
        fix = f"loralens convert … --to {adapter.format} writes the names of the model"
        adapter = replace(adapter, findings=(*adapter.findings, Finding("note", "trainer-names", text, fix)))
    return replace(_with_kernels(adapter, config, base), source=str(path))


def _stored_in_memory(tensors: Mapping[str, Any], config: Any) -> Stored:
    """A state dict as the file that would hold it; a configuration of PEFT may be an object with ``to_dict``."""
    fields = config.to_dict() if hasattr(config, "to_dict") else config
    # Enumerations and sets of PEFT become what they are in its JSON.
    plain = None if fields is None else parse_json(dumps(fields, default=plain_value))
    try:
        arrays = {str(key): lazy_value(value) for key, value in tensors.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"holds something that is not a tensor: {error}", fix="give tensors by their keys") from error
    return Stored(arrays, {"format": "pt"}, plain)


def plain_value(value: object) -> object:
    """A set as a sorted list, and any other value that JSON does not know as text."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _with_options(adapter: Adapter, alpha: float | None, scale: float | None, *, once: bool, strict: bool) -> Adapter:
    """The adapter with what the user says of it, after a check of what makes its numbers wrong."""
    adapter = _rescale(adapter, alpha, scale)
    if once:
        adapter = adapter.map(lambda m: m.rescaled(m.scale / 2, m.scaling.once()) if m.scaling.twice else m)
    for finding in adapter.findings:
        if strict and finding.level == "error":
            raise MismatchError(finding.text, fix=finding.fix)
    return adapter


def _with_kernels(adapter: Adapter, config: Mapping[str, Any] | None, base: ModelPath | None) -> Adapter:
    """The adapter with the kernels of its convolutions, as far as they are known."""
    # Only LyCORIS and some types of PEFT flatten kernels.
    if adapter.format == "lycoris" or (config or {}).get("peft_type") not in (None, "LORA"):
        from loralens.formats.dialects.lycoris import with_known_kernels

        return with_known_kernels(adapter, base)
    return adapter


# Tinker's name of the head of a language model, in its adapters before their conversion.
_TINKER_HEAD = re.compile(r"(?<![^.])(?:model\.)?unembed_tokens(?=\.)")


def _with_plain_keys(tensors: Mapping[str, LazyArray]) -> Mapping[str, LazyArray]:
    """Tensors by the names that the base model has: without wrappers of trainers, and with the usual name of the head.

    Raises
    ------
    FormatError
        Two keys become the same.
    """
    if not any(part in key for key in tensors for part in (*WRAPPERS, "unembed_tokens")):
        return tensors
    plain: dict[str, LazyArray] = {}
    for key, tensor in tensors.items():
        name = _TINKER_HEAD.sub("lm_head", without_wrappers(key))
        if name in plain:
            raise FormatError(f"{key} is stored twice, with and without the wrapper of a trainer", fix=SAVE_AGAIN)
        plain[name] = tensor
    return plain


def _read_dialect(stored: Stored, name: str | None, base: ModelPath | None) -> Adapter:
    if name is not None:
        adapter = FORMATS[NAMES.index(name)].read(stored, base)
        if not len(adapter):
            raise FormatError(f"nothing in it is of the dialect {name}", fix="leave out --format, or give another one")
        return adapter
    check_peft_type(stored.config)
    adapter = detect_format(stored).read(stored, base)
    check_peft_type(adapter.config)  # some readers take the configuration from the file's own header
    return adapter


def check_peft_type(config: Mapping[str, Any] | None) -> None:
    """Refuse an adapter whose PEFT configuration names a type whose update is not a sum, such as IA³.

    This happens before any dialect is tried, because the tensors of such an adapter may look like those of a dialect.
    """
    # Other programs have no such field in their configurations.
    kind = (config or {}).get("peft_type")
    if kind is None:
        return
    from loralens.formats.dialects.peft.reader import TYPES

    if kind in TYPES:
        return
    named_type = ascii(kind)[:40] if isinstance(kind, str) else "of an unknown type"
    raise FormatError(
        f"the configuration says that this is {named_type}, not a LoRA",
        fix=f"loralens reads adapters whose update is a sum, of PEFT {', '.join(TYPES[:-1])} and {TYPES[-1]}; give "
        "--format NAME if the file is of another program and the configuration does not belong to it",
    )


# Names of pairs of which loralens reads none, and the software that has them.
_FOREIGN = (
    (re.compile(r"\.adapter(_\w+)?\.linear_(in|out)\."), "Megatron-Bridge and NeMo"),
    (re.compile(r"(^|[./])(w|kernel)_lora_[ab]($|[./])"), "Qwix, which Tunix and MaxText use"),
)


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
    for pattern, software in _FOREIGN:
        if any(map(pattern.search, stored.tensors)):
            raise FormatError(f"has the names of {software}; its keys begin with {keys}", fix=EXPORT)
    what = f"holds no LoRA pairs of any dialect known here; its keys begin with {keys}"
    raise FormatError(what, fix="check that this is an adapter, not a model")


def _rescale(adapter: Adapter, alpha: float | None, scale: float | None) -> Adapter:
    """The adapter with an α or a scale that the user gives for a file that stores none."""
    if alpha is None and scale is None:
        return adapter

    def rescale(module: Update) -> Update:
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
        if module.scaling.stated and module.scale and rescaled[name].scale != module.scale:
            raise OptionError(f"the file states its own scale ({module.scaling})", fix="leave out --alpha and --scale")
    # The findings about α say that it was unknown or assumed, which is no longer so.
    findings = tuple(finding for finding in adapter.findings if not finding.code.startswith("alpha-"))
    return replace(rescaled, findings=findings)


@checks_keywords
def save(
    adapter: Adapter,
    path: str | PathLike[str],
    *,
    format: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    arch: str | None = None,
    base_config: Mapping[str, Any] | None = None,
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
    arch : str, optional
        For GGUF: llama.cpp's name of the architecture of the base, or Hugging Face's class.
    base_config : mapping, optional
        For GGUF and mlx: the content of the base model's config.json.

    Raises
    ------
    OptionError
        The format is unknown or only read, or the target exists.
    FormatError, MismatchError
        The format cannot hold something of the adapter, or the disk cannot be written.
    """
    from loralens.formats.files.adapter_files import write_files

    target = Path(path)
    with place(target):
        stored, files = encode_adapter(adapter, format, arch=arch, base_config=base_config)
    write_files(stored, target, files=files, overwrite=overwrite, dry_run=dry_run)


def encode_adapter(
    adapter: Adapter,
    format: str | None = None,
    *,
    arch: str | None = None,
    base_config: Mapping[str, Any] | None = None,
) -> tuple[Stored, Files]:
    """The tensors and header that `save` would write, and the files that they go to; no number is computed yet.

    Parameters and errors are those of `save`.
    """
    name = format or adapter.format
    writers = {form.name: form for form in FORMATS if form.writer}
    if name not in writers:
        raise OptionError(f"{name!r} cannot be written", fix=f"choose one of {', '.join(writers)}")
    form, converted = writers[name], adapter.format != name
    assert form.files
    for option, value, holders in (("arch", arch, (GGUF,)), ("base_config", base_config, (GGUF, "mlx"))):
        if value is not None and name not in holders:
            raise OptionError(f"{name} has no option {option!r}", fix=f"it is one of {', '.join(holders)}")
    # Only GGUF can store that the rows of q and k are in llama.cpp's order.
    if name != GGUF:
        check_rows(adapter.modules)
    if converted:
        from loralens.formats.dialects.expert_layouts import carry_notes, fit_to_dialect

        adapter = fit_to_dialect(name, adapter, base_config=base_config, arch=arch)
    stored = form.write(adapter, arch, base_config) if name == GGUF else form.write(adapter)
    # A header that is too long is refused before the tensors are read back and noted, which takes the most memory.
    if len(stored.tensors) > MANY_TENSORS and form.files.weights.endswith(".safetensors"):
        header_bytes(stored.tensors, stored.metadata)
    if converted:
        stored = carry_notes(name, adapter, stored)
    # The hashes are known when the tensors are written, and are as long then.
    stored = replace(stored, metadata=stored.metadata and with_digest(stored.metadata))
    # A file in its own dialect says everything itself, unless the adapter came with a record that must go on.
    if converted or form.silent or RECORD in (adapter.metadata or {}):
        from loralens.formats.dialects import conversion_record

        stored = conversion_record.stamp(stored, adapter, form.read(stored))
    return stored, form.files


def stored_size(stored: Stored, files: Files) -> int:
    """The size in bytes of the file of weights that ``stored`` would become."""
    suffix, tensors = Path(files.weights).suffix, stored.tensors
    if suffix == ".bin":
        from loralens.formats.files.torch_pickle import torch_size  # few files are pickles

        return torch_size(tensors)
    if suffix == ".gguf":
        from loralens.formats.files.gguf_file import gguf_size  # few files are GGUF

        return gguf_size(stored)
    return len(header_bytes(by_width(tensors.items()), stored.metadata)) + sum(t.nbytes for t in tensors.values())


def __dir__() -> list[str]:
    """What is public: modules that this one imports are not."""
    return sorted(__all__)
