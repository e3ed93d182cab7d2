"""GGUF files: read by our own code, which checks every count and offset, and written by the reference implementation.

``gguf.GGUFReader`` makes an array of every token of a vocabulary: for 150,000 tokens it takes 13 s and 600 MiB. This
module skips them in 0.13 s. ``GGUFReader`` also trusts the file, and maps it.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: ``GGUF``, u32 version, u64 number of
tensors, u64 number of key-values, the key-values, for each tensor its name, axes (innermost first), type and offset;
then the numbers. Each tensor begins at a multiple of ``general.alignment``.

Metadata of an adapter map text to text, while GGUF's values have types, and llama.cpp refuses a u32 where it expects an
f32. So the type is appended to the key, and the value is JSON::

    general.architecture                  llama
    adapter.lora.alpha:f32                16.0
    adapter.alora.invocation_tokens:u32[] [64, 512]

A text keeps its plain key, unless the key itself contains a colon: then it is ``key:str``.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, final

import ml_dtypes
import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.core.stored import parse_json
from loralens.errors import FormatError, place
from loralens.formats.files.atomic import atomic_file
from loralens.formats.files.container import OpenFile, Stored
from loralens.formats.files.json_text import NAME_LIMIT, check_printable


class TensorType(NamedTuple):
    """A type of ggml: its name, the numbers of a block, and the bytes of a block."""

    name: str
    numbers: int
    nbytes: int


# ggml's number of a type, its name, and the numbers and the bytes of a block: from ggml.h and ggml-common.h of ggml.
# Numbers that are missing belonged to former types, which every reader refuses.
_TYPES = """
     0 F32       1   4
     1 F16       1   2
    30 BF16      1   2
    28 F64       1   8
    24 I8        1   1
    25 I16       1   2
    26 I32       1   4
    27 I64       1   8
     2 Q4_0     32  18
     3 Q4_1     32  20
     6 Q5_0     32  22
     7 Q5_1     32  24
     8 Q8_0     32  34
     9 Q8_1     32  40
    10 Q2_K    256  84
    11 Q3_K    256 110
    12 Q4_K    256 144
    13 Q5_K    256 176
    14 Q6_K    256 210
    15 Q8_K    256 292
    16 IQ2_XXS 256  66
    17 IQ2_XS  256  74
    18 IQ3_XXS 256  98
    19 IQ1_S   256  50
    20 IQ4_NL   32  18
    21 IQ3_S   256 110
    22 IQ2_S   256  82
    23 IQ4_XS  256 136
    29 IQ1_M   256  56
    34 TQ1_0   256  54
    35 TQ2_0   256  66
    39 MXFP4    32  17
    40 NVFP4    64  36
    41 Q1_0    128  18
"""
TENSOR_TYPES = {
    int(number): TensorType(name, int(numbers), int(nbytes))
    for number, name, numbers, nbytes in map(str.split, _TYPES.strip().splitlines())
}
DTYPES = {  # ggml's number of a type → dtype
    **dict(enumerate(map(np.dtype, (np.float32, np.float16)))),
    **dict(enumerate(map(np.dtype, (np.int8, np.int16, np.int32, np.int64, np.float64)), start=24)),
    30: np.dtype(ml_dtypes.bfloat16),
}
TYPES = {dtype: code for code, dtype in DTYPES.items()}
Q8_0 = 8
BLOCK = np.dtype([("scale", np.float16), ("numbers", np.int8, 32)])  # of Q8_0
# type of a value in the file → name and struct code; 8 and 9 are a text and an array
_SCALARS = "u8 B, i8 b, u16 H, i16 h, u32 I, i32 i, f32 f, bool ?, str s, array s, u64 Q, i64 q, f64 d"
TEXT, ARRAY = 8, 9
SCALARS = {
    number: (row.split()[0], row.split()[1])
    for number, row in enumerate(_SCALARS.split(", "))
    if number not in (TEXT, ARRAY)
}
CODES = {name: code for code, (name, _) in SCALARS.items()} | {"str": TEXT}
NAMES = {code: name for name, code in CODES.items()}
_PACKING = dict(SCALARS.values())

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 1 had 32-bit counts and was never used for adapters; 3 only adds big-endian files
# Most items of an array that is read. Sizes may have one number for each block, and aLoRA has some tokens; a vocabulary
# has thousands, whose reading would take a second.
LONGEST = 1024
CHUNK = 1 << 16  # bytes of the header that are read at a time, because most values are only a few bytes
HEADER_LIMIT = 100_000_000  # bytes of a header; vocabularies take some millions of them, and are skipped
MOST_ENTRIES = 1 << 20  # tensors and key-values, which take some hundred bytes of memory each
MANY = 1 << 20  # bytes that are read at a time where a long list of texts is skipped
ALIGNMENT = 32  # GGUF's default
MOST_ALIGNMENT = 1 << 16  # beyond this, a small file could claim any amount of padding
MOST_AXES = 4  # ggml's limit
BROKEN = "the file is damaged: download or convert it again"
_TAKE_OUT = "take the value out of the metadata, or read the file again"


class Value(NamedTuple):
    """One value: the name of its type, whether it is an array of them, and the value itself."""

    kind: str
    array: bool
    value: Any


def to_text(key: str, value: Value) -> tuple[str, str]:
    """The key and the text of a value in the metadata."""
    if value.kind == "str" and not value.array and ":" not in key:
        return key, value.value
    suffix = f"{value.kind}[]" if value.array else value.kind
    return f"{key}:{suffix}", value.value if suffix == "str" else json.dumps(value.value, ensure_ascii=False)


def from_text(key: str, text: str) -> tuple[str, Value]:
    """The key and the value that a text in the metadata stands for; a FormatError if GGUF cannot hold it."""
    name, colon, suffix = key.rpartition(":")
    if not colon or suffix == "str":
        return name if colon else key, Value("str", array=False, value=text)
    kind, array = suffix.removesuffix("[]"), suffix.endswith("[]")
    if kind not in CODES:
        raise FormatError(f"{key}: {kind[:20]!a} is not a type of GGUF", fix=_TAKE_OUT)
    with place(key):
        try:
            value = parse_json(text)
        except ValueError as error:
            raise FormatError(f"{text[:40]!a} is not valid JSON", fix=_TAKE_OUT) from error
        # A text from outside may hold a list where a number is expected.
        items = value if array and isinstance(value, list) else [value]
        if array != isinstance(value, list) or not all(_fits(kind, item) for item in items):
            raise FormatError(f"{text[:40]!a} cannot be stored as {suffix}", fix=_TAKE_OUT)
    return name, Value(kind, array, value)


def _fits(kind: str, item: Any) -> bool:
    if kind == "str" or kind == "bool" or isinstance(item, bool):  # struct would pack True as the number 1
        return kind == {str: "str", bool: "bool"}.get(type(item))
    try:
        struct.pack(f"<{_PACKING[kind]}", item)
    except (struct.error, OverflowError, TypeError):
        return False
    return True


def plain_values(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The values of metadata by their key in the file, without their types."""
    values = (from_text(key, text) for key, text in (metadata or {}).items())
    return {key: value.value for key, value in values}


@final
class Header:
    """A reader of the bytes before the numbers, from the first to the last; ``at`` is the position of the next one."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._held, self._start = b"", 0
        self.at = 0

    @property
    def remaining(self) -> int:
        """The number of bytes that have not been taken yet, at most those of the largest header."""
        return max(0, min(self._file.size, HEADER_LIMIT) - self.at)

    def skip(self, count: int) -> None:
        """Skip the next ``count`` bytes without reading them."""
        if count > self.remaining:
            what = f"the header needs {count:,} bytes at {self.at:,}, but {self.remaining:,} are left"
            raise FormatError(what, fix=BROKEN)
        self.at += count

    def take(self, count: int) -> bytes:
        """Take the next ``count`` bytes."""
        begin = self.at
        self.skip(count)
        # The bytes that are in memory do not reach far enough.
        if self.at > self._start + len(self._held):
            self._held = self._file.read(begin, min(max(count, CHUNK), self._file.size - begin))
            self._start = begin
        return self._held[begin - self._start : self.at - self._start]

    def number(self, code: str) -> Any:
        """Take the next number; ``code`` is its type in the struct module."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def skip_texts(self, count: int) -> None:
        """Skip the next ``count`` texts. Only lengths are decoded: a vocabulary has a quarter of a million texts."""
        while count:
            data = self._file.read(self.at, min(MANY, self.remaining))
            position = 0
            while count and position + 8 <= len(data):
                position += 8 + int.from_bytes(data[position : position + 8], "little")
                count -= 1
            # Fewer than 8 bytes are left, which hold no length.
            if not position:
                raise FormatError("a list of texts ends before its last one", fix=BROKEN)
            self.skip(position)

    def text(self, most: int | None = None) -> str:
        """Take the next text: its length, which is at most ``most``, then its bytes in UTF-8."""
        length = self.number("Q")
        if most is not None and length > most:
            raise FormatError(f"a name claims {length:,} bytes", fix=BROKEN)
        data = self.take(length)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{data[:20]!r} is not UTF-8", fix=BROKEN) from error

    def name(self, others: Mapping[str, object]) -> str:
        """Take the next text as a name, which is short, printable and not among ``others``."""
        name = self.text(NAME_LIMIT)
        check_printable(name)
        if name in others:
            raise FormatError(f"{name} appears twice", fix=BROKEN)
        return name


def _counts(header: Header) -> tuple[int, int]:
    """The numbers of tensors and key-values that the file claims."""
    if header.take(4) != MAGIC:
        raise FormatError("does not begin as a GGUF file", fix="give a GGUF file")
    version = header.number("I")
    if version not in VERSIONS:
        big = version and not version & 0xFFFF  # a small number in big-endian order has zeros in its low bytes
        found = "in big-endian order" if big else f"version {version}"
        what = f"is GGUF {found}, but only versions 2 and 3 in little-endian order can be read"
        raise FormatError(what, fix="convert it again with a current llama.cpp")
    tensors, values = header.number("Q"), header.number("Q")
    # Each takes at least 12 bytes: the length of its name (8) and a type (4).
    if tensors + values > min(MOST_ENTRIES, header.remaining // 12):
        raise FormatError(f"claims {tensors:,} tensors and {values:,} key-values: too many", fix=BROKEN)
    return tensors, values


def _value(header: Header) -> Value:
    kind, length = header.number("I"), None
    if kind == ARRAY:
        kind, length = header.number("I"), header.number("Q")
    if kind not in NAMES:
        what = "an array of arrays" if kind == ARRAY else f"a value of type {kind}"
        raise FormatError(f"{what} does not occur in GGUF files of models and adapters", fix=BROKEN)
    if length is not None and length > LONGEST:
        if kind == TEXT:
            header.skip_texts(length)
        else:
            header.skip(length * struct.calcsize(SCALARS[kind][1]))
        return Value(NAMES[kind], array=True, value=None)
    count = 1 if length is None else length
    items = [header.text() if kind == TEXT else header.number(SCALARS[kind][1]) for _ in range(count)]
    return Value(NAMES[kind], length is not None, items[0] if length is None else items)


class TensorInfo(NamedTuple):
    """The header's entry of a tensor; ``shape`` in NumPy's order, ``begin`` counted from the start of the numbers."""

    shape: tuple[int, ...]
    kind: int
    begin: int
    nbytes: int


@final
@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of one GGUF file.

    Attributes
    ----------
    file : OpenFile
    values : mapping of str to Value
        The key-values in the order of the file; the value of an array of more than `LONGEST` items is None.
    ends : mapping of str to int
        The position after each key-value.
    infos : mapping of str to TensorInfo
        The tensors in the order of the header.
    infos_at : int
        The position after the key-values, where the entries of the tensors begin.
    start : int
        The position of the numbers.
    alignment : int
        Each tensor begins at a multiple of it, counted from ``start``.
    """

    file: OpenFile
    values: Mapping[str, Value]
    ends: Mapping[str, int]
    infos: Mapping[str, TensorInfo]
    infos_at: int
    start: int
    alignment: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file and check every count and offset; no number is read.

    Raises
    ------
    FormatError
        The file is damaged, or has a type of tensors that is unknown here.
    """
    with place(path):
        file = OpenFile(path)
        header = Header(file)
        tensors, count = _counts(header)
        values: dict[str, Value] = {}
        ends: dict[str, int] = {}
        for _ in range(count):
            key = header.name(values)
            with place(key):
                values[key], ends[key] = _value(header), header.at
        infos_at, infos = header.at, dict[str, TensorInfo]()
        for _ in range(tensors):
            name = header.name(infos)
            with place(name):
                infos[name] = _info(header)
        alignment = read_alignment(values.get("general.alignment"))
        start = rounded_up(header.at, alignment)
        _check_coverage(infos, start, file.size, alignment)
        return GgufHeader(file, values, ends, infos, infos_at, start, alignment)


def rounded_up(position: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-position // alignment) * alignment


def read_alignment(stored: Value | None) -> int:
    """The alignment of tensors by the value of ``general.alignment``, a power of two."""
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
    if kind not in TENSOR_TYPES:
        fix = "give the model in another quantisation, such as Q4_K_M or Q8_0"
        raise FormatError(f"is stored as type {kind} of ggml, which is unknown here", fix=fix)
    name, numbers, nbytes = TENSOR_TYPES[kind]
    if (shape or (1,))[-1] % numbers:
        raise FormatError(f"{name} {shape} is not in blocks of {numbers}", fix=BROKEN)
    return TensorInfo(shape, kind, begin, prod(shape) // numbers * nbytes)


def _check_coverage(infos: Mapping[str, TensorInfo], start: int, size: int, alignment: int) -> None:
    """Refuse tensors that are not stored one after the other, each at the next multiple of the alignment."""
    end, before = 0, "the header"
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if info.begin != rounded_up(end, alignment):
            raise FormatError(f"{name} begins at byte {info.begin:,} of the data, not right after {before}", fix=BROKEN)
        end, before = info.begin + info.nbytes, name
        if start + end > size:
            what = f"{name} ends at byte {start + end:,}, but the file has {size:,}: the file is truncated"
            raise FormatError(what, fix=BROKEN)
    # Writers may pad the last tensor too, so less than one alignment may follow it.
    trailing = size - start - end
    if trailing >= alignment:
        raise FormatError(f"{trailing:,} bytes follow {before}", fix=BROKEN)


def read_gguf(path: Path) -> Stored:
    """Read the header of a GGUF adapter and check every offset; no number is read yet.

    The key-values are in ``metadata`` as text, and in ``plain`` by their own keys.

    Raises
    ------
    FormatError
        The file is damaged, or it is not an adapter.
    """
    header = read_gguf_header(path)
    with place(path):
        plain = {key: value.value for key, value in header.values.items()}
        # Both are required by llama.cpp.
        kind, adapter = plain.get("general.type"), plain.get("adapter.type")
        if (kind, adapter) != ("adapter", "lora"):
            description = f"{adapter!a:.40} adapter" if kind == "adapter" else f"{kind or 'model'!a:.40} file"
            fix = "give the adapter that convert_lora_to_gguf.py or loralens wrote"
            raise FormatError(f"is a GGUF {description}, not a LoRA adapter", fix=fix)
        for key, value in plain.items():
            if value is None:
                raise FormatError(f"{key} has more than {LONGEST:,} values", fix="give an adapter, not a model")
        arrays = {name: _array(name, header, info) for name, info in header.infos.items()}
        return Stored(arrays, dict(to_text(key, value) for key, value in header.values.items()), plain=plain)


def _array(name: str, header: GgufHeader, info: TensorInfo) -> LazyArray:
    """The numbers of a tensor of an adapter."""
    begin, shape = header.start + info.begin, info.shape
    if info.kind in DTYPES:
        return header.file.array(begin, shape, DTYPES[info.kind])
    # Q8_0 is the only quantised type that llama.cpp's converter writes for adapters.
    if info.kind != Q8_0:
        fix = "convert the adapter as f32, f16, bf16 or q8_0"
        raise FormatError(f"{name}: is stored as {TENSOR_TYPES[info.kind].name}", fix=fix)

    def dequantise(blocks: Array) -> Array:
        """Each of the 32 numbers of a block times the block's float16 scale, in float32."""
        with np.errstate(invalid="ignore"):  # a damaged file may hold an infinite scale, and inf · 0 is NaN
            return np.asarray(blocks["numbers"] * blocks["scale"].astype(np.float32)[:, None]).reshape(shape)

    return header.file.array(begin, (prod(shape) // 32,), BLOCK).map(dequantise, shape=shape, dtype=np.float32)


def write_gguf(stored: Stored, path: Path) -> None:
    """Write the tensors and metadata of a GGUF adapter, one tensor at a time; the same input gives the same bytes.

    Raises
    ------
    FormatError
        GGUF cannot hold a dtype, or a value in the metadata.
    """
    values = dict(from_text(key, text) for key, text in (stored.metadata or {}).items())
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


def _write(stored: Stored, values: Mapping[str, Value], path: Path) -> None:
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
            writer.write_tensor_data(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8))
    finally:
        writer.close()


def gguf_size(stored: Stored) -> int:
    """The bytes that `write_gguf` would write: header, key-values, entries of tensors, and the padded numbers."""
    values = dict(from_text(key, text) for key, text in (stored.metadata or {}).items())
    # Magic (4), version (4) and two counts (8 each).
    header = 24
    for key, value in values.items():
        # The length of the key (8) and the type (4); an array has the type of its items (4) and their number (8).
        header += 8 + len(key.encode()) + 4 + (12 if value.array else 0)
        for item in value.value if value.array else [value.value]:
            header += 8 + len(item.encode()) if value.kind == "str" else struct.calcsize(_PACKING[value.kind])
    # The length of the name (8), the number of axes (4), the axes (8 each), the type (4) and the offset (8).
    header += sum(24 + len(key.encode()) + 8 * tensor.ndim for key, tensor in stored.tensors.items())
    alignment = read_alignment(values.get("general.alignment"))
    # The header is padded as well.
    return sum(rounded_up(part, alignment) for part in (header, *(t.nbytes for t in stored.tensors.values())))
