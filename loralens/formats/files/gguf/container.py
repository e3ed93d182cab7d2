"""GGUF files: read by our own code, which checks every count and offset, and written by the reference implementation.

``gguf.GGUFReader`` maps a file and trusts it, so a damaged file ends in an error of NumPy or kills the process.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: ``GGUF``, u32 version, u64 number of
tensors, u64 number of key-values, the key-values, for each tensor its name, axes (innermost first), type and offset;
then the numbers. Each tensor begins at a multiple of ``general.alignment``.
"""

from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.errors import FormatError, place
from loralens.formats.files.atomic import atomic_file
from loralens.formats.files.container import OpenFile, Stored
from loralens.formats.files.gguf import header as gguf_header
from loralens.formats.files.gguf import values as gguf_values
from loralens.formats.files.gguf.header import BROKEN, Header
from loralens.formats.files.gguf.values import CODES, Value
from loralens.formats.files.json_text import check_printable

ALIGNMENT = 32  # GGUF's default
MOST_ALIGNMENT = 1 << 16  # beyond this, a small file could claim any amount of padding
MOST_AXES = 4  # ggml's limit

DTYPES = {  # ggml's number of a type → dtype
    0: np.dtype(np.float32), 1: np.dtype(np.float16), 24: np.dtype(np.int8), 25: np.dtype(np.int16),
    26: np.dtype(np.int32), 27: np.dtype(np.int64), 28: np.dtype(np.float64), 30: np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
TYPES = {dtype: code for code, dtype in DTYPES.items()}
Q8_0 = 8
BLOCK = np.dtype([("scale", np.float16), ("numbers", np.int8, 32)])  # of Q8_0


class TensorInfo(NamedTuple):
    """The header's entry of a tensor; ``shape`` in NumPy's order, ``begin`` counted from the start of the numbers."""

    shape: tuple[int, ...]
    kind: int
    begin: int
    nbytes: int


def read_gguf(path: Path) -> Stored:
    """Read the header of a GGUF adapter and check every offset; no number is read yet.

    The key-values are in ``metadata`` as text (see `loralens.formats.files.gguf.values`), and in ``plain`` by their own
    keys.

    Raises
    ------
    FormatError
        The file is damaged, or it is not an adapter.
    """
    with place(path):
        file = OpenFile(path)
        header = Header(file)
        tensors, values = gguf_header.read_counts(header)
        key_values = dict(gguf_header.read_values(header, values))
        plain = {key: value.value for key, value in key_values.items()}
        check_adapter(plain)
        infos: dict[str, TensorInfo] = {}
        for _ in range(tensors):
            name = header.name()
            # The second one would silently replace the first.
            if name in infos:
                raise FormatError(f"{name} appears twice", fix=BROKEN)
            with place(name):
                infos[name] = _info(header)
        alignment = read_alignment(key_values.get("general.alignment"))
        start = -(-header.at // alignment) * alignment  # rounded up
        check_coverage(infos, start, file.size, alignment)
        arrays = {name: _array(file, start, info) for name, info in infos.items()}
        metadata = dict(gguf_values.to_text(key, value) for key, value in key_values.items())
        return Stored(arrays, metadata, plain=plain)


def check_adapter(plain: dict[str, Any]) -> None:
    """Refuse a GGUF file that is not a LoRA adapter; the message says what it is instead."""
    # Both are required by llama.cpp.
    kind, adapter = plain.get("general.type"), plain.get("adapter.type")
    if kind == "adapter" and adapter == "lora":
        return
    description = f"{adapter!a:.40} adapter" if kind == "adapter" else f"{kind or 'model'!a:.40} file"
    fix = "give the adapter that convert_lora_to_gguf.py or loralens wrote"
    raise FormatError(f"is a GGUF {description}, not a LoRA adapter", fix=fix)


def read_alignment(stored: Value | None) -> int:
    """The alignment of tensors by the value of ``general.alignment``.

    Raises
    ------
    FormatError
        It is not a power of two, or too large.
    """
    if stored is None:
        return ALIGNMENT
    size = stored.value
    # The value may come from anybody: a zero, a list or a text would raise an exception of Python.
    if (stored.kind, stored.array) != ("u32", False) or not 1 <= size <= MOST_ALIGNMENT or size & (size - 1):
        raise FormatError(f"general.alignment is {size!r:.20}, not a power of two up to {MOST_ALIGNMENT:,}", fix=BROKEN)
    return int(size)


def _info(header: Header) -> TensorInfo:
    axes = header.number("I")
    if axes > MOST_AXES:
        raise FormatError(f"claims to have {axes:,} axes", fix=BROKEN)
    shape = tuple(header.number("Q") for _ in range(axes))[::-1]
    kind, begin = header.number("I"), header.number("Q")
    # the only quantised type that llama.cpp's converter writes for adapters
    if kind == Q8_0:
        if not shape or shape[-1] % 32:
            raise FormatError(f"Q8_0 {shape} is not in blocks of 32", fix=BROKEN)
        return TensorInfo(shape, kind, begin, prod(shape) // 32 * BLOCK.itemsize)
    if kind not in DTYPES:
        raise FormatError(f"is stored as {_type(kind)}", fix="convert the adapter as f32, f16, bf16 or q8_0")
    return TensorInfo(shape, kind, begin, prod(shape) * DTYPES[kind].itemsize)


def _type(kind: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(kind).name
    except ValueError:
        return f"unknown type {kind}"


def check_coverage(infos: dict[str, TensorInfo], start: int, size: int, alignment: int) -> None:
    """Refuse tensors that are not stored one after the other, each at the next multiple of the alignment."""
    end, before = 0, "the header"
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if info.begin != -(-end // alignment) * alignment:
            raise FormatError(f"{name} begins at byte {info.begin:,} of the data, not right after {before}", fix=BROKEN)
        end, before = info.begin + info.nbytes, name
        if start + end > size:
            what = f"{name} ends at byte {start + end:,}, but the file has {size:,}: the file is truncated"
            raise FormatError(what, fix=BROKEN)
    # Writers may pad the last tensor too, so less than one alignment may follow it.
    trailing = size - start - end
    if trailing >= alignment:
        raise FormatError(f"{trailing:,} bytes follow {before}", fix=BROKEN)


def _array(file: OpenFile, start: int, info: TensorInfo) -> LazyArray:
    if info.kind != Q8_0:
        return file.array(start + info.begin, info.shape, DTYPES[info.kind])
    blocks = file.array(start + info.begin, (*info.shape[:-1], info.shape[-1] // 32), BLOCK)
    return _dequantise(blocks, info.shape)


def _dequantise(blocks: LazyArray, shape: tuple[int, ...]) -> LazyArray:
    """Q8_0 as float32: each of the 32 numbers of a block times the block's float16 scale."""

    def numbers(array: Array) -> Array:
        with np.errstate(invalid="ignore"):  # a damaged file may hold an infinite scale, and inf · 0 is NaN
            scaled = array["numbers"] * array["scale"].astype(np.float32)[..., None]
        return np.asarray(scaled.reshape(*array.shape[:-1], 32 * array.shape[-1]), np.float32)

    def rows(first: int, last: int) -> Array:
        return numbers(blocks.rows(first, last).read())

    rowwise = rows if len(shape) > 1 else None  # the "rows" of a vector would be blocks of 32 of its numbers
    return LazyArray(lambda: numbers(blocks.read()), shape=shape, dtype=np.float32, rows=rowwise)


def write_gguf(stored: Stored, path: Path) -> None:
    """Write the tensors and metadata of a GGUF adapter, one tensor at a time; the same input gives the same bytes.

    Before the file takes its place, the reference implementation of the format opens it as a check.

    Raises
    ------
    FormatError
        GGUF cannot hold a dtype, or a value in the metadata.
    """
    from gguf import GGUFReader

    values = dict(gguf_values.from_text(key, text) for key, text in (stored.metadata or {}).items())
    for key, value in values.items():
        check_printable(key)
        if value.array and not value.value:
            raise FormatError(f"{key} is an empty array, which GGUF cannot hold", fix="take it out of the metadata")
    for key, tensor in stored.tensors.items():
        check_printable(key)
        if tensor.dtype not in TYPES:
            raise FormatError(f"{key}: GGUF has no {tensor.dtype}", fix="convert it to float32")
    # The reference writer opens the file by its name a second time.
    with atomic_file(path) as stream:
        _write(stored, values, Path(stream.name))
        try:
            # Only the names are compared: the package that reads the numbers has written them too.
            assert {tensor.name for tensor in GGUFReader(stream.name).tensors} == set(stored.tensors)
        except (ValueError, LookupError) as error:
            raise FormatError(f"gguf cannot read what was written ({error})", fix="report this as a bug") from error


def _write(stored: Stored, values: dict[str, Value], path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    architecture = values.get("general.architecture", Value("str", array=False, value="")).value
    # The writer puts the architecture first by itself, so the loop below leaves it out.
    writer = GGUFWriter(None, architecture if isinstance(architecture, str) else "")
    writer.data_alignment = read_alignment(values.get("general.alignment"))
    for key, value in values.items():
        if key not in writer.kv_data[0]:
            kind = GGUFValueType(CODES[value.kind])
            outer_type = GGUFValueType.ARRAY if value.array else kind
            writer.add_key_value(key, value.value, outer_type, sub_type=kind if value.array else None)
    for key, tensor in stored.tensors.items():
        # The header comes before all numbers, and holds the offset of every tensor.
        writer.add_tensor_info(
            key, tensor.shape, tensor.dtype, tensor.nbytes, raw_dtype=GGMLQuantizationType(TYPES[tensor.dtype])
        )
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in stored.tensors.values():
            array = np.ascontiguousarray(tensor.read())
            writer.write_tensor_data(array.reshape(-1).view(np.uint8))
    finally:
        writer.close()
