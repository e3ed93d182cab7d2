"""The raw content of adapter files, before a dialect interprets it: tensors by key, metadata and a configuration.

Safetensors files are read by our own code. Every offset is checked before a byte is read. Numbers are read with
``pread`` when they are needed, and the file is never memory-mapped: a mapped file that shrinks kills the process, while
here it is an error. No size that a file claims is allocated before it is checked.

Layout of a safetensors file (https://github.com/huggingface/safetensors): 8 bytes little-endian n, n bytes of JSON
``{key: {"dtype", "shape", "data_offsets"}, "__metadata__": {str: str}}``, then the numbers.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, final

import ml_dtypes
import numpy as np

from loralens.core.lazy import Array, LazyArray, row_blocks
from loralens.errors import FormatError, place
from loralens.formats.files.json_text import MOST_MEMORY, check_printable, encodable, parse_object, parsed_size
from loralens.formats.files.outside import is_relative_name, open_regular

CONFIG = "adapter_config.json"
RECORD = "loralens"  # the key of our record in the metadata, and the name of its file beside a pickle
# Keys of the metadata of image adapters that hold the SHA-256 of all bytes after the header, and what stands before it.
# sd-scripts (library/train_util.py) and ModelSpec 1.0.1 say so.
HASHES = {"sshs_model_hash": "", "modelspec.hash_sha256": "0x"}
# The hash of 64 KiB, which only an extension that is no longer maintained reads; without it that computes its own.
OLD_HASH = "sshs_legacy_hash"
NO_DIGEST = "0" * 64  # until the tensors are written
PREFIX = 8  # bytes before the header, which hold its length
HEADER_LIMIT = 1 << 25  # bytes, as of 200,000 tensors; also of other JSON files
MANY_TENSORS = 100_000  # from here on the header may become too long
MOST_AXES = 64  # NumPy's limit
MOST_READ = 2  # bytes that may be read at once for each byte that is needed
PIECE = 1 << 20  # bytes of a tensor that are copied at a time, so that memory does not grow with the tensor

# The dtypes of safetensors, from NumPy or from ml_dtypes. Those of less than 8 bits are missing.
_TYPES = """
    F64 float64, F32 float32, F16 float16, BF16 bfloat16, F8_E4M3 float8_e4m3fn, F8_E5M2 float8_e5m2,
    F8_E4M3FNUZ float8_e4m3fnuz, F8_E5M2FNUZ float8_e5m2fnuz, F8_E8M0 float8_e8m0fnu, I64 int64, I32 int32, I16 int16,
    I8 int8, U64 uint64, U32 uint32, U16 uint16, U8 uint8, BOOL bool, C64 complex64
"""
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(getattr(ml_dtypes, kind, kind)) for name, kind in map(str.split, _TYPES.split(","))
}
# E8M0 is a power of two without a sign: a type of scales, not of weights.
FLOATS = frozenset(dtype for name, dtype in DTYPES.items() if name[0] in "FB" and name not in ("BOOL", "F8_E8M0"))
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_STILL = "begin again when nothing else writes to it"
_TRUNCATED = "download or copy the file again: its end is missing"
_SHRUNK = f"{_STILL}; if nothing does, {_TRUNCATED}"
_BROKEN = "the file is damaged, or not a safetensors file: download or save it again"
_RESTORE = "restore the file or save the adapter again"


def _state(status: os.stat_result) -> tuple[int, int, int, int]:
    """The values that change when a file is written to, or replaced by another."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@final
class OpenFile:
    """A file that is open for reading and is closed when nothing refers to it any more."""

    __slots__ = ("_fd", "_state", "path", "size")

    def __init__(self, path: Path) -> None:
        self._fd = -1  # for __del__, if opening fails
        self.path = path
        self._fd = open_regular(path)
        status = os.fstat(self._fd)
        self.size = status.st_size
        # compared at every read
        self._state = _state(status)

    @property
    def is_unchanged(self) -> bool:
        """Whether the file has the size, the time and the inode that it had when it was opened."""
        try:
            # The open file, which may have been written to, and the path, which may be another file now.
            return _state(os.fstat(self._fd)) == _state(self.path.stat()) == self._state
        except OSError:
            return False

    def check_unchanged(self) -> None:
        """Refuse a file that was written to or replaced since it was opened.

        Raises
        ------
        FormatError
            Its size, its time or its inode has changed, or its path is now another file.
        """
        if not self.is_unchanged:
            raise FormatError("was changed while it was read", fix=_STILL).at(str(self.path))

    def read(self, start: int, count: int) -> bytes:
        """Read ``count`` bytes from ``start``; the caller has checked that the file was that long when opened."""
        parts = []
        while count:  # one call reads at most 2 GiB on Linux
            try:
                part = os.pread(self._fd, count, start)
            except OSError as error:
                what = f"cannot be read: {error.strerror}"
                raise FormatError(what, fix="check the disk, or copy the file again").at(str(self.path)) from error
            if not part:
                raise FormatError("the file became shorter while it was read", fix=_SHRUNK).at(str(self.path))
            parts.append(part)
            start, count = start + len(part), count - len(part)
        # Bytes of two versions must not be mixed: the header was checked for the first one only.
        if _state(os.fstat(self._fd)) != self._state:
            raise FormatError("was changed while it was read", fix=_STILL).at(str(self.path))
        return b"".join(parts)

    def array(self, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> LazyArray:
        """The numbers at ``start`` as an array that is read when it is needed."""
        # Rows can be read separately, because the numbers are contiguous.
        return LazyArray(None, shape=shape, dtype=dtype, numbers=_Numbers(self, start, dtype))

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


@final
class _Numbers:
    """Numbers of a file, read from their first to their last index; called by `LazyArray`.

    A class, since a function with the same three values takes four times the memory, and a file has many tensors.
    """

    __slots__ = ("dtype", "file", "start")

    def __init__(self, file: OpenFile, start: int, dtype: np.dtype[Any]) -> None:
        self.file, self.start, self.dtype = file, start, dtype

    def __call__(self, first: int, last: int) -> Array:
        width = self.dtype.itemsize
        return np.frombuffer(self.file.read(self.start + first * width, (last - first) * width), self.dtype)


def read_together(arrays: Sequence[LazyArray]) -> list[Array]:
    """The arrays as `LazyArray.read` gives them; those of one file are read in one call if little lies between them."""
    stored: dict[OpenFile, dict[int, int]] = defaultdict(dict)
    for i, array in enumerate(arrays):
        if isinstance(array.numbers, _Numbers):
            stored[array.numbers.file][i] = array.numbers.start
    read: dict[int, Array] = {}
    for file, starts in stored.items():
        first, end = min(starts.values()), max(start + arrays[i].nbytes for i, start in starts.items())
        if end - first > MOST_READ * sum(arrays[i].nbytes for i in starts):
            continue
        data = file.read(first, end - first)
        for i, start in starts.items():
            array = arrays[i]
            # Numbers that are not aligned in memory, as between tensors of another dtype, are read into their own.
            if not (start - first) % array.dtype.itemsize:
                read[i] = np.frombuffer(data, array.dtype, array.size, start - first).reshape(array.shape)
    return [read[i] if i in read else array.read() for i, array in enumerate(arrays)]


@final
@dataclass(frozen=True, slots=True)
class Stored:
    """The tensors of one adapter as they are stored, with the metadata and the configuration.

    Attributes
    ----------
    tensors
        By key, in the order of the file.
    metadata
        The header metadata; None if the file has none.
    config
        The JSON object of ``adapter_config.json`` beside the file.
    plain
        Numbers, strings and lists that a pickle or GGUF file holds beside its tensors.
    names
        Only when writing. Names of modules in this dialect → their canonical names, as far as the two differ.
    file
        The safetensors file that the tensors are read from.
    """

    tensors: Mapping[str, LazyArray]
    metadata: Mapping[str, str] | None = None
    config: Mapping[str, Any] | None = None
    plain: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    file: OpenFile | None = field(default=None, compare=False, repr=False)


@final
@dataclass(frozen=True, slots=True)
class Files:
    """The names of the files of a dialect: the weights, whose suffix names the container, and the configuration.

    ``optional`` is for dialects that rarely have a configuration. If the adapter has none, an existing file of that
    name is left alone.
    """

    weights: str
    config: str | None = None
    optional: bool = False


PEFT = Files("adapter_model.safetensors", CONFIG)


def read_safetensors(path: Path) -> Stored:
    """Read the header of a safetensors file and check every offset; no number is read yet.

    Raises
    ------
    FormatError
        The file is damaged, or is not a safetensors file.
    """
    with place(path):
        file = OpenFile(path)
        header = read_header(file)
        metadata, spans = parse_header(header, file.size - len(header))
        tensors = {key: file.array(len(header) + span.begin, span.shape, span.dtype) for key, span in spans.items()}
        return Stored(tensors, metadata, file=file)


def read_shards(index: Path) -> Stored:
    """Read the headers of an adapter in several files, by the JSON object that says which tensor is in which file.

    Raises
    ------
    FormatError
        The index says nothing about files beside it, or a tensor is not where it says.
    """
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(n, str) and is_relative_name(n) for n in files.values()):
        with place(index):
            raise FormatError("its weight_map does not say which files hold the tensors", fix=_RESTORE)
    shards = {name: read_safetensors(index.parent / name) for name in sorted(set(files.values()))}
    stray = [key for key, name in files.items() if key not in shards[name].tensors]
    if stray:
        with place(index):
            raise FormatError(f"{stray[0]} is not in {files[stray[0]]}", fix=_RESTORE)
    metadata = next((shard.metadata for shard in shards.values()), None)
    return Stored({key: shards[name].tensors[key] for key, name in files.items()}, metadata)


class Span(NamedTuple):
    """Where the numbers of a tensor are, counted from the end of the header."""

    begin: int
    end: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def parse_header(header: bytes, size: int | None = None) -> tuple[dict[str, str] | None, dict[str, Span]]:
    """The metadata and the tensors of a header with its length in front; a FormatError if anything in it is wrong.

    ``size`` is that of the numbers; None if it is not known.
    """
    entries = parse_object(header[PREFIX:], "utf-8", what="the header ", fix=_BROKEN)
    metadata = read_metadata(entries.pop("__metadata__", None))
    spans = {key: _span(key, entry) for key, entry in entries.items()}
    _check_coverage(spans, max((span.end for span in spans.values()), default=0) if size is None else size)
    return metadata, spans


def read_header(file: OpenFile) -> bytes:
    """The length and the JSON text in front of the numbers."""
    if file.size < PREFIX:
        raise FormatError(f"{file.size} bytes are too few for any tensor file", fix=_TRUNCATED)
    length = int.from_bytes(file.read(0, PREFIX), "little")
    # The length is checked before anything of that length is read.
    if length > file.size - PREFIX:
        raise FormatError(f"the header claims {length:,} bytes, but the file has {file.size:,}", fix=_BROKEN)
    if length > HEADER_LIMIT:
        raise FormatError(
            f"the header claims {length:,} bytes, and loralens reads at most {HEADER_LIMIT:,}", fix=_BROKEN
        )
    return file.read(0, PREFIX + length)


def read_metadata(entry: Any) -> dict[str, str] | None:
    """The metadata of a header, which map texts to texts; a FormatError if they do not."""
    if entry is None:
        return None
    if not isinstance(entry, dict) or not all(isinstance(v, str) and encodable(v) for v in entry.values()):
        raise FormatError("__metadata__ is not a mapping of text to text", fix="save the file with text as metadata")
    return entry


def _span(key: str, entry: Any) -> Span:
    with place(key):
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
            raise FormatError("its header entry lacks dtype, shape or data_offsets", fix=_BROKEN)
        shape, offsets, name = entry["shape"], entry["data_offsets"], entry["dtype"]
        if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
            raise FormatError("shape or data_offsets are not whole numbers", fix=_BROKEN)
        # A list, for example, could not be looked up in a mapping.
        dtype = DTYPES.get(name) if isinstance(name, str) else None
        if dtype is None:
            raise FormatError(f"dtype {name!a:.40} is unknown", fix=f"store it as one of {', '.join(DTYPES)}")
        begin, end = offsets
        shown = "(" + ", ".join(map(str, shape[:8])) + (", …" if len(shape) > 8 else "") + ")"
        # Zeros are left out of the product: NumPy refuses (0, 2**62, 2**62) as well, though it is empty.
        if len(shape) > MOST_AXES or prod(n for n in shape if n) * dtype.itemsize >= 2**63:
            raise FormatError(f"{name} {shown} is too big for any array", fix=_BROKEN)
        if end - begin != prod(shape) * dtype.itemsize:
            raise FormatError(f"{name} {shown} does not take the {end - begin:,} bytes of its offsets", fix=_BROKEN)
        return Span(begin, end, tuple(shape), dtype)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**63 for x in value)


def _check_coverage(spans: Mapping[str, Span], size: int) -> None:
    """Refuse tensors that overlap, leave gaps, or do not end where the file ends, as the format demands."""
    ordered = sorted((span.begin, span.end, key) for key, span in spans.items())
    # The pair (0, 0) in front demands that the first tensor begins at byte 0.
    for (_, end, first), (begin, last, second) in pairwise([(0, 0, "the start"), *ordered]):
        if last > size:
            what = f"{second} ends at byte {last:,} of the data, but the file holds {size:,}: the file is truncated"
            raise FormatError(what, fix=_TRUNCATED)
        if begin != end:
            how = "overlap" if begin < end else f"leave {begin - end:,} unused bytes between them"
            raise FormatError(f"{first} and {second} {how}", fix=_BROKEN)
    used = ordered[-1][1] if ordered else 0
    if used != size:
        raise FormatError(f"{size - used:,} bytes follow the last tensor", fix=_BROKEN)


def read_json(path: Path, *, fix: str = _RESTORE) -> dict[str, Any]:
    """Read the JSON object in a file; ``fix`` is the advice if there is none."""
    with place(path):
        file = OpenFile(path)
        if file.size > HEADER_LIMIT:
            raise FormatError(f"{file.size:,} bytes are too many for a configuration", fix=fix)
        # Editors of Windows put a byte order mark before the text, which "utf-8-sig" skips.
        return parse_object(file.read(0, file.size), "utf-8-sig", what="", fix=fix)


def header_bytes(tensors: Mapping[str, LazyArray], metadata: Mapping[str, str] | None) -> bytes:
    """The length prefix and the JSON header of a safetensors file; the same input gives the same bytes."""
    # The text is put together entry by entry: 200,000 tensors as mappings would take five times its memory.
    text, begin = bytearray(b"{"), 0
    if metadata is not None:
        text += b'"__metadata__":%b,' % _compact(read_metadata(dict(metadata)))
    for key, tensor in tensors.items():
        check_printable(key)
        if tensor.dtype not in DTYPE_NAMES:
            raise FormatError(f"{key}: safetensors has no {tensor.dtype}", fix="convert it to float32")
        end = begin + tensor.nbytes
        entry = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": (begin, end)}
        text += b"%b:%b," % (_compact(key), _compact(entry))
        begin = end
    text[max(1, len(text) - 1) :] = b"}"  # in the place of the last comma
    # The numbers then start at a multiple of 8, as in files of the reference implementation.
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT or parsed_size(text) > MOST_MEMORY:  # our reader would not accept it
        what = f"{len(tensors):,} tensors need a header of {len(text):,} bytes, and loralens reads and writes"
        what += f" at most {HEADER_LIMIT:,} bytes, and about 200,000 tensors"
        raise FormatError(what, fix="divide the modules among several files")
    return len(text).to_bytes(PREFIX, "little") + text


def with_digest(metadata: Mapping[str, str], digest: str = NO_DIGEST) -> dict[str, str]:
    """The metadata of a file with this SHA-256 of its tensors, under those keys of `HASHES` that they have."""
    return {key: HASHES[key] + digest if key in HASHES else text for key, text in metadata.items() if key != OLD_HASH}


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def by_width(tensors: Iterable[tuple[str, LazyArray]]) -> dict[str, LazyArray]:
    """Tensors in the order of a file: wide numbers first, so that every tensor is aligned to its own dtype."""
    return dict(sorted(tensors, key=lambda item: -item[1].dtype.itemsize))


def as_bytes(numbers: Array) -> memoryview:
    """The bytes of an array in C order."""
    return np.ascontiguousarray(numbers).reshape(-1).view(np.uint8).data


def tensor_pieces(tensor: LazyArray) -> Iterator[Array]:
    """The numbers of a tensor in order, about one MiB at a time if its rows can be read separately."""
    if not tensor.streams or not tensor.size:
        yield tensor.read()
        return
    for _, rows in row_blocks(tensor, PIECE // tensor.dtype.itemsize):
        yield rows
