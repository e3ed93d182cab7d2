"""Writing a changed copy of a GGUF model. The copy appears complete or not at all.

If no tensor changes its type, the copy equals the original in every byte (metadata, padding, other tensors) except for
those of the changed tensors. If some do, as in a merge in floats, the entries of all tensors are written anew after the
key-values. Of the key-values, ``general.file_type`` changes, and the number of tensors of a split model if a tensor is
added. If weights become codes, ``general.quantization_version`` is added where it is missing.
"""

import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from loralens.core.lazy import Array, LazyArray, row_blocks
from loralens.core.names import some
from loralens.errors import LEAVE_OUT, FormatError, place
from loralens.formats.dialects.gguf_architectures import place_of
from loralens.formats.files.atomic import check_space
from loralens.formats.files.container import tensor_pieces
from loralens.formats.files.disk import write_at
from loralens.formats.files.gguf_file import CODES, DTYPES, SCALARS, TENSOR_TYPES, TYPES, GgufHeader, rounded_up
from loralens.formats.models.gguf_base import ARCHITECTURE, GgufModel
from loralens.formats.models.low_bit.gguf_blocks import Order, can_decode
from loralens.formats.models.model_files import ModelFiles
from loralens.formats.models.model_writer import Change, CopyOptions, Fill, WriteJob, new_copy, open_part, write_jobs
from loralens.linalg.codes import GGML_BLOCK, Q4_1, Q8_0
from loralens.tables.numbers import count

# The values of general.file_type (llama_ftype in llama.h), which states the type of most tensors.
FILE_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 32}
# Matrices that llama.cpp multiplies in float32 only. Its own converter stores them in no other type.
_ALWAYS_FLOAT32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "position_embd.weight", "token_types.weight")
_BLOCK = 1 << 18  # numbers that are converted at a time
QUANTIZATION_VERSION = 2  # of the block types of ggml, as general.quantization_version states it
_FIX = "give a base in another quantisation, such as Q4_K_M or Q8_0"


class NewTypes(NamedTuple):
    """Types of the tensors of a copy that are not those of the original.

    Attributes
    ----------
    kinds
        Key → ggml's number of the new type.
    file_type
        The new value of ``general.file_type``.
    """

    kinds: Mapping[str, int]
    file_type: int


class StoredChange(NamedTuple):
    """The type and shape of a stored tensor of the copy."""

    kind: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor in the file."""
        type_ = TENSOR_TYPES[self.kind]
        return prod(self.shape) // type_.numbers * type_.nbytes


def float_dtypes(model: GgufModel, dtype: np.dtype[Any]) -> dict[str, np.dtype[Any]]:
    """Key → dtype of every tensor of a copy in floats, as llama.cpp loads it.

    Matrices get ``dtype``. Vectors (norms, biases) and the matrices that llama.cpp has in float32 only are float32.

    Raises
    ------
    FormatError
        A tensor is of a type that cannot be decoded.
    """
    dtypes: dict[str, np.dtype[Any]] = {}
    for key, weight in model.weights.items():
        info = model.info(weight)
        if info.kind not in DTYPES and not can_decode(info.kind):
            what = f"{weight.tensor} is stored as {TENSOR_TYPES[info.kind].name}, which cannot be decoded here"
            raise FormatError(what, fix=_FIX)
        stored = DTYPES.get(info.kind)
        # Tensors of integers are tables, not weights.
        if stored is not None and stored not in FILE_TYPES:
            dtypes[key] = stored
        elif len(info.shape) < 2 or weight.tensor.endswith(_ALWAYS_FLOAT32):
            dtypes[key] = np.dtype(np.float32)
        else:
            dtypes[key] = dtype
    return dtypes


def float_types(model: GgufModel, dtype: np.dtype[Any]) -> NewTypes:
    """The types of a copy in floats. ``file_type`` names the narrowest dtype, since other weights are float32."""
    dtypes = float_dtypes(model, dtype)
    common = min((each for each in dtypes.values() if each in FILE_TYPES), key=lambda each: each.itemsize)
    return NewTypes({key: TYPES[each] for key, each in dtypes.items()}, FILE_TYPES[common])


def write_gguf_copy(
    files: ModelFiles,
    target: Path,
    *,
    changes: Mapping[str, Change] | Collection[str],
    fill: Fill,
    types: NewTypes | None = None,
    options: CopyOptions = CopyOptions(),  # noqa: B008 - it is frozen
) -> None:
    """Write a copy of a GGUF model in which some weights are changed.

    Parameters
    ----------
    files : ModelFiles
        The original (``files.gguf``), which is only read.
    target : Path
        A file, or a folder if the model is in a folder or in parts. It appears complete or not at all.
    changes : mapping of str to Change, or collection of str
        The keys (Hugging Face's names) of the weights that ``fill`` makes. The model may lack some matrices among
        them, such as a head that was tied to the embedding; they are added with the dtype and shape of their `Change`.
    fill : callable
        Gives the rows of a changed weight by its key, in Hugging Face's order and in blocks: in floats of its new
        type, or as uint8 rows of blocks of its new type. A coded weight that keeps its type comes as uint8 rows of
        `CodedWeight.encode`. It is called in several threads, each for one weight.
    types : NewTypes or None
        New types of weights: of floats (`float_types`), where the weights that do not change are decoded and rounded;
        or of codes, where all of them are among ``changes``. None: every tensor keeps its type.
    options : CopyOptions
        ``watch`` gets blocks of bytes (uint8), in the order of `ModelFiles.stored`, of the weights whose type does not
        change. The steps have `gguf_copy_bytes` in all.

    Raises
    ------
    OptionError
        The target exists, or overlaps with an input, or holds files that would be lost.
    FormatError
        The disk reports an error, a tensor cannot be decoded, or the architecture has no place for an added matrix.
    """
    model = files.gguf
    assert model is not None
    new, plans = _plan(model, changes, types)
    with new_copy(files, target, options) as unfinished, ExitStack() as opened:
        check_space(target, sum(plan.size for plan in plans))
        jobs = list[WriteJob]()
        for part, plan in enumerate(plans):
            fd = open_part(unfinished, files, files.shards[part].name, plan.size, opened)
            for position, data in plan.fixed:
                write_at(fd, data, position)
            for key, weight in model.weights.items():
                if weight.part == part:
                    jobs.append(_job(model, key, plan, fd, changes, fill))
        # New tensors follow the last tensor of the last file.
        for key, tensor in new.items():
            nbytes = plan.tensors[tensor].nbytes
            jobs.append(WriteJob(key, fd, plan.positions[tensor], nbytes, partial(fill, key), copied=False))
        write_jobs(unfinished, jobs, options)


def gguf_copy_bytes(
    model: GgufModel, changes: Mapping[str, Change] | Collection[str] = (), types: NewTypes | None = None
) -> int:
    """The bytes of all tensors that `write_gguf_copy` writes, without headers."""
    return sum(tensor.nbytes for plan in _plan(model, changes, types)[1] for tensor in plan.tensors.values())


class _PartPlan(NamedTuple):
    """What one file of the copy holds.

    Attributes
    ----------
    size
        Its bytes.
    fixed
        Bytes that do not belong to a tensor: the header, and padding that is copied, each with its position.
    tensors
        By llama.cpp's name.
    positions
        The position of each tensor's numbers in the file.
    """

    size: int
    fixed: list[tuple[int, bytes]]
    tensors: Mapping[str, StoredChange]
    positions: Mapping[str, int]


def _plan(
    model: GgufModel, changes: Mapping[str, Change] | Collection[str], types: NewTypes | None
) -> tuple[dict[str, str], list[_PartPlan]]:
    """llama.cpp's name of every new matrix by its key, and what every file of the copy holds."""
    new: dict[str, str] = {}
    added: dict[str, StoredChange] = {}
    for key, change in changes.items() if isinstance(changes, Mapping) else ():
        if key not in model.weights:
            spot = place_of(key.removesuffix(".weight"), model.architecture.name)
            if spot is None or spot.expert is not None:
                what = f"{key}: {model.architecture.name} has no tensor of that name in llama.cpp"
                raise FormatError(what, fix=LEAVE_OUT)
            new[key] = f"{spot.tensor}.weight"
            added[new[key]] = StoredChange(TYPES[change.dtype], change.shape)
    kinds = {model.weights[key].tensor: kind for key, kind in types.kinds.items()} if types else {}
    plans = []
    for header in model.headers:
        old = {name: StoredChange(info.kind, info.shape) for name, info in header.infos.items()}
        tensors = {name: StoredChange(kinds.get(name, stored.kind), stored.shape) for name, stored in old.items()}
        if header is model.headers[-1]:
            tensors |= added
        same = tensors == old and not added
        plans.append(_same_layout(header, old) if same else _new_layout(header, tensors, types=types, added=len(added)))
    return new, plans


def _same_layout(header: GgufHeader, tensors: Mapping[str, StoredChange]) -> _PartPlan:
    """A file whose header, positions and padding are those of the original."""
    fixed = [(0, header.file.read(0, header.start))]
    positions, end = {}, header.start
    for name, info in sorted(header.infos.items(), key=lambda item: item[1].begin):
        begin = header.start + info.begin
        # ggml writes zeros as padding. The copy keeps the padding of the original, whatever it is.
        if begin > end:
            fixed.append((end, header.file.read(end, begin - end)))
        positions[name], end = begin, begin + info.nbytes
    if header.file.size > end:
        fixed.append((end, header.file.read(end, header.file.size - end)))
    return _PartPlan(header.file.size, fixed, tensors, positions)


def _new_layout(
    header: GgufHeader, tensors: Mapping[str, StoredChange], *, types: NewTypes | None, added: int
) -> _PartPlan:
    """A file with the key-values of the original and new entries of tensors."""
    front = bytearray(header.file.read(0, header.infos_at))
    struct.pack_into("<Q", front, 8, len(tensors))  # the count follows "GGUF" and the version
    _patch(header, front, "split.tensors.count", lambda count: count + added)
    if types:
        _patch(header, front, "general.file_type", lambda _: types.file_type)
        if any(kind not in DTYPES for kind in types.kinds.values()):
            _append_missing(header, front, types.file_type)
    offsets, end, entries = {}, 0, bytearray()
    for name, tensor in tensors.items():
        offsets[name] = rounded_up(end, header.alignment)
        end = offsets[name] + tensor.nbytes
        text = name.encode()
        axes = tensor.shape[::-1]
        entries += struct.pack(
            f"<Q{len(text)}sI{len(axes)}QIQ", len(text), text, len(axes), *axes, tensor.kind, offsets[name]
        )
    start = rounded_up(len(front) + len(entries), header.alignment)
    head = bytes(front + entries).ljust(start, b"\0")
    # ggml pads the last tensor too.
    size = start + rounded_up(end, header.alignment)
    return _PartPlan(size, [(0, head)], tensors, {name: start + offset for name, offset in offsets.items()})


def _patch(header: GgufHeader, front: bytearray, key: str, change: Callable[[int], int]) -> None:
    """Replace the value of a whole number among the key-values, if the file has it."""
    value = header.values.get(key)
    if value is None or value.array or not isinstance(value.value, int) or isinstance(value.value, bool):
        return
    code = f"<{SCALARS[CODES[value.kind]][1]}"
    # The number is at the end of its key-value pair.
    struct.pack_into(code, front, header.ends[key] - struct.calcsize(code), change(value.value))


def _append_missing(header: GgufHeader, front: bytearray, file_type: int) -> None:
    """Append the key-values that llama-quantize writes for codes, if the original lacks them."""
    # In a split model, the first file has the general key-values.
    if ARCHITECTURE not in header.values:
        return
    for key, number in (("general.quantization_version", QUANTIZATION_VERSION), ("general.file_type", file_type)):
        if key not in header.values:
            text = key.encode()
            front += struct.pack(f"<Q{len(text)}sII", len(text), text, CODES["u32"], number)
            (field_count,) = struct.unpack_from("<Q", front, 16)  # the count follows the number of tensors
            struct.pack_into("<Q", front, 16, field_count + 1)


def _job(model: GgufModel, key: str, plan: _PartPlan, fd: int, changes: Collection[str], fill: Fill) -> WriteJob:
    """The writing of one weight, which is made or copied."""
    weight = model.weights[key]
    info, tensor = model.info(weight), plan.tensors[weight.tensor]
    # One expert is a part of the stored tensor; all experts have the same size.
    nbytes = tensor.nbytes // (1 if weight.expert is None else info.shape[0])
    offset = plan.positions[weight.tensor] + (weight.expert or 0) * nbytes

    def made() -> Iterator[Array]:
        """The rows of a changed or converted weight, in the order of the file."""
        rows = fill(key) if key in changes else _round_rows(model.tensors[key], DTYPES[tensor.kind])
        with place(key):
            if weight.shift:
                rows = ((block.astype(np.float32) + np.float32(weight.shift)).astype(block.dtype) for block in rows)
            yield from rows if weight.order is None else in_file_order(rows, weight.order)

    if key in changes or tensor.kind != info.kind:
        return WriteJob(key, fd, offset, nbytes, made, copied=False)
    # The hash is that of the numbers in Hugging Face's order and without a shift, unlike the floats in the file.
    differs = info.kind in DTYPES and (weight.order is not None or weight.shift != 0)
    watched = partial(tensor_pieces, model.stored(key)) if differs else None
    return WriteJob(key, fd, offset, nbytes, partial(tensor_pieces, model.raw(key)), copied=True, watched=watched)


def _round_rows(tensor: LazyArray, dtype: np.dtype[Any]) -> Iterator[Array]:
    for _, block in row_blocks(tensor, _BLOCK):
        # A number that is too large becomes infinite, as everywhere in a merge.
        with np.errstate(over="ignore", invalid="ignore"):
            yield block.astype(dtype)


def in_file_order(blocks: Iterator[Array], order: Order) -> Iterator[Array]:
    """Blocks of rows in another order, given as the position of every row.

    Rows are held back only until all rows that precede them in the file have arrived: at most the rows of one head.
    """
    # Row i completes all rows before it if no position so far is larger than i.
    complete = np.flatnonzero(np.maximum.accumulate(order) == np.arange(len(order))) + 1
    done, waiting = 0, None
    for block in blocks:
        waiting = block if waiting is None else np.concatenate([waiting, block])
        ready = int(complete[complete <= done + len(waiting)].max(initial=done))
        rows = np.empty_like(waiting[: ready - done])
        rows[order[done:ready] - done] = waiting[: ready - done]
        yield rows
        waiting, done = waiting[ready - done :], ready
    assert done == len(order), (done, len(order))


# The numbers of general.file_type (llama_ftype in llama.h) by the type of most weights.
BLOCK_FILE_TYPES = {Q4_1.number: 3, Q8_0.number: 7}
FLOATS = ("F32", "F16", "BF16")
# Small matrices, or ones that are no linear layers, by a part of their name.
LEFT_IN_FLOATS = (
    "_norm.weight", "ffn_gate_inp", "position_embd.weight", "token_types.weight", "attn_rel_b.weight", "ssm_conv1d",
    "shortconv.conv.weight", "altup", "laurel", "per_layer_model_proj",
)  # fmt: skip
HEAD, EMBEDDING = "output.weight", "token_embd.weight"


def block_types(model: GgufModel, number: int, *, new_head: bool = False) -> tuple[NewTypes, str]:
    """What the weights of a model in floats become, and a sentence on what is quantised and what stays as it is.

    Parameters
    ----------
    model : GgufModel
    number : int
        ggml's number of the type of most weights: Q4_1 or Q8_0.
    new_head : bool
        Whether a head is added, which stays in floats.
    """
    names = {name for header in model.headers for name in header.infos}
    # Without a head of its own, the model multiplies by the embedding.
    head = HEAD if new_head or HEAD in names else EMBEDDING
    kinds: dict[str, int] = {}
    floats = ["the new head"] if new_head else []
    for key, weight in model.weights.items():
        info = model.info(weight)
        if len(info.shape) < 2:
            continue
        name, whole = weight.tensor, info.shape[-1] % GGML_BLOCK == 0
        # Whether llama.cpp quantises a stored tensor with this name and shape.
        fits = name.endswith("weight") and whole and not any(part in name for part in LEFT_IN_FLOATS)
        if TENSOR_TYPES[info.kind].name in FLOATS and fits:
            kinds[key] = Q8_0.number if weight.tensor == head else number
        else:
            floats.append(weight.tensor)
    own = sum(kind == number for kind in kinds.values())
    text = f"{count(own, 'weight')} become {TENSOR_TYPES[number].name}"
    if own < len(kinds):
        text += f" and the head {TENSOR_TYPES[Q8_0.number].name}"
    float_names = f"{some(list(dict.fromkeys(floats)), 3)} and vectors" if floats else "vectors"
    return NewTypes(kinds, BLOCK_FILE_TYPES[number]), f"{text}; {float_names} stay floats"
