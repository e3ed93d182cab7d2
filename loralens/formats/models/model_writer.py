"""Writing a changed copy of a model in the layout of the original. The copy appears complete or not at all."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Unpack, final

import numpy as np

from loralens.core.lazy import LazyArray
from loralens.core.stored import parse_json
from loralens.errors import FormatError
from loralens.formats.files.atomic import check_space
from loralens.formats.files.container import DTYPES
from loralens.formats.files.disk import write_at
from loralens.formats.files.json_text import dumps
from loralens.formats.files.regular import read_whole
from loralens.formats.files.relative_name import path_to_write
from loralens.formats.files.safetensors_header import header_bytes, tensor_pieces
from loralens.formats.models.model_copy import CopyOptions, WriteJob, new_copy, write_jobs, write_text
from loralens.formats.models.model_copy import Fill as Fill
from loralens.formats.models.model_files import Index, ModelFiles, WeightFile, offsets_of

# Headers come only from an undo file, so a bad header means that this file is damaged.
_DAMAGED = "the undo file is damaged: use another copy"
_ANOTHER = "give the undo file of the merge that wrote this model, undamaged"


@final
@dataclass(frozen=True, slots=True)
class Change:
    """The dtype and shape of a tensor of the copy that differs from the original."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor in the file."""
        return prod(self.shape) * self.dtype.itemsize


def write_model(
    files: ModelFiles,
    target: Path,
    *,
    changes: Mapping[str, Change],
    fill: Fill,
    dropped: Collection[str] = (),
    homes: Mapping[str, str] | None = None,
    headers: Mapping[str, bytes] | None = None,
    **options: Unpack[CopyOptions],
) -> None:
    """Write a copy of a model in which some tensors are changed.

    Parameters
    ----------
    files : ModelFiles
        The files of the original, which are only read.
    target : Path
        A folder, or a file if the model is a file. It appears complete or not at all.
    changes : mapping of str to Change
        By key. A key that the model does not have is added to the shard that ``homes`` says, or else to the last shard
        of its component.
    fill : callable
        Gives the rows of a changed tensor by its key, in order and in blocks of the new dtype. It is called in several
        threads, each for one tensor.
    dropped : collection of str
        Keys that the copy leaves out.
    homes : mapping of str to str, or None
        New key → a key of the model; the new tensor is written to the shard of that key.
    headers : mapping of str to bytes, or None
        The complete headers (length and JSON) of some shards. They say which tensors these shards hold.
    **options : CopyOptions
        The steps have `copy_bytes` in all.

    Raises
    ------
    OptionError
        The target exists, or overlaps with an input, or holds files that would be lost.
    FormatError
        The disk reports an error.
    """
    assert files.gguf is None, "GGUF files are copied by write_gguf_copy"
    with new_copy(files, target, options) as part, ExitStack() as opened:
        if files.root.is_dir():
            # If an undo file gives the original text of an index, `new_copy` has written it already.
            for index in (index for index in files.indices if index.name not in options.get("texts", {})):
                write_text(path_to_write(part, index.name), _index_text(index, files, changes, dropped, homes or {}))
        jobs, tensors = list[WriteJob](), files.tensors
        check_space(target, copy_bytes(tensors, changes))
        for shard in files.shards:
            path = path_to_write(part, shard.name) if files.root.is_dir() else part
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            opened.callback(os.close, fd)
            parts = frozenset(dropped), homes or {}, (headers or {}).get(shard.name)
            jobs += _jobs(shard, fd, files, changes, fill, *parts)
        write_jobs(part, jobs, options)


def copy_bytes(tensors: Mapping[str, LazyArray], changes: Mapping[str, Change]) -> int:
    """The bytes of all tensors of the original and the changes, also of those that the copy leaves out."""
    return sum(_spec(key, tensors, changes).nbytes for key in {*tensors, *changes})


def _index_text(
    index: Index,
    files: ModelFiles,
    changes: Mapping[str, Change],
    dropped: Collection[str],
    homes: Mapping[str, str],
) -> str:
    """The index with added and dropped keys and the new total size; byte for byte the old one if nothing changed.

    Some indices name tensors that no shard holds. These stay in the index and add nothing to the total size.
    """
    tensors = files.tensors
    old = index.content["weight_map"]
    names = {key: shard for key, shard in old.items() if index.prefix + key not in dropped}
    shards = {key: _shard_for(key, files, homes) for key in changes if key not in tensors}
    names |= {
        key.removeprefix(index.prefix): Path(shard.name).name
        for key, shard in shards.items()
        if shard.prefix == index.prefix
    }
    all_keys = {*tensors, *changes}
    size = sum(_spec(key, tensors, changes).nbytes for name in names if (key := index.prefix + name) in all_keys)
    if names == old and size == sum(tensors[key].nbytes for name in old if (key := index.prefix + name) in tensors):
        # `read_text` would change the line ends of Windows.
        return read_whole(files.root / index.name).decode("utf-8")
    old_metadata = index.content.get("metadata")
    metadata = {**(old_metadata if isinstance(old_metadata, dict) else {}), "total_size": size}
    return dumps({**index.content, "metadata": metadata, "weight_map": names})


def _shard_for(key: str, files: ModelFiles, homes: Mapping[str, str]) -> WeightFile:
    """The shard for a tensor that the model does not have: that of its home, or the last one of its component."""
    if key in homes:
        home = homes[key]
        return next(
            shard
            for shard in files.shards
            if home.startswith(shard.prefix) and home.removeprefix(shard.prefix) in shard.stored.tensors
        )
    # The prefix of a single model is empty, so all of its shards fit.
    own = [shard for shard in files.shards if key.startswith(shard.prefix)]
    return (own or files.shards)[-1]


def _spec(key: str, tensors: Mapping[str, LazyArray], changes: Mapping[str, Change]) -> Change:
    """The dtype and shape of a tensor of the copy."""
    return changes[key] if key in changes else Change(tensors[key].dtype, tensors[key].shape)


def _jobs(
    shard: WeightFile,
    fd: int,
    files: ModelFiles,
    changes: Mapping[str, Change],
    fill: Fill,
    dropped: Collection[str],
    homes: Mapping[str, str],
    header: bytes | None,
) -> Iterator[WriteJob]:
    """Give a shard's file its full size and its header, and return the tensors that are still to be written.

    The header stays byte for byte the same if no tensor changes its dtype, its shape or its shard.
    """
    tensors = files.tensors
    offsets: Mapping[str, int]
    if header:
        specs, offsets = _specs_of(header, shard.name)
    else:
        keys = [shard.prefix + key for key in shard.stored.tensors if shard.prefix + key not in dropped]
        keys += [key for key in changes if key not in tensors and _shard_for(key, files, homes) is shard]
        specs = {key.removeprefix(shard.prefix): _spec(key, tensors, changes) for key in keys}
        header, offsets = shard.header, shard.offsets
        if specs != {key: Change(t.dtype, t.shape) for key, t in shard.stored.tensors.items()}:
            # These arrays are never made: a header needs only their dtype and shape.
            empty = {
                key: LazyArray(partial(np.empty, spec.shape, spec.dtype), shape=spec.shape, dtype=spec.dtype)
                for key, spec in specs.items()
            }
            header = header_bytes(empty, shard.stored.metadata)
            offsets = offsets_of(header[8:])
    # A header that the caller gives comes from an undo file, which may belong to another model.
    for key, spec in specs.items():
        full_key = shard.prefix + key
        if not (full_key in changes or full_key in tensors) or _spec(full_key, tensors, changes) != spec:
            raise FormatError(f"{shard.name}: its header and the model differ in {key}", fix=_ANOTHER)
    # With the full size set first, threads can write tensors at their positions in any order.
    os.truncate(fd, len(header) + sum(spec.nbytes for spec in specs.values()))
    write_at(fd, header, 0)
    for key, spec in specs.items():
        full_key = shard.prefix + key
        copied = full_key not in changes
        blocks = partial(tensor_pieces, tensors[full_key]) if copied else partial(fill, full_key)
        yield WriteJob(full_key, fd, len(header) + offsets[key], spec.nbytes, blocks, copied)


def _specs_of(header: bytes, name: str) -> tuple[dict[str, Change], dict[str, int]]:
    """The tensors that a header describes, and the position of the numbers of each."""
    try:
        entries = parse_json(header[8:])
        specs = {
            key: Change(DTYPES[entry["dtype"]], tuple(entry["shape"]))
            for key, entry in entries.items()
            if key != "__metadata__"
        }
        position = 0
        # Tensors must follow each other without gaps: the file is as long as their sum.
        for key in sorted(specs, key=lambda key: entries[key]["data_offsets"]):
            begin, position = position, position + specs[key].nbytes
            if entries[key]["data_offsets"] != [begin, position]:
                raise ValueError(f"offsets of {key}")
        return specs, offsets_of(header[8:])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"{name}: its header is not as it was written ({ascii(error)[:120]})"
        raise FormatError(what, fix=_DAMAGED) from error
