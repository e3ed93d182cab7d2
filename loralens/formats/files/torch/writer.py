"""Writing a torch pickle without torch: what ``torch.save`` makes of a state dict, with one tensor in memory at a time.

The container is a zip archive without compression. It has ``data.pkl``, the pickle (protocol 2) with the dtype, shape
and storage of each tensor, and ``data/0``, ``data/1`` … with the numbers, each at a multiple of 64 bytes as in torch's
files. The same tensors give the same bytes: nothing depends on the clock or on the order of hashes. The pickle uses
only opcodes that ``torch.load(weights_only=True)`` and `loralens.formats.files.torch.unpickler` read. It writes every
name once, so a file that torch wrote does not grow when loralens writes it again.
"""

from collections.abc import Iterator, Mapping
from itertools import accumulate
from operator import mul
from struct import pack
from typing import Any, final
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np

from loralens.core.lazy import LazyArray
from loralens.errors import FormatError
from loralens.formats.files.json_text import check_printable
from loralens.formats.files.torch.names import STORAGE_DTYPES, TENSOR_DTYPES, Name

# torch's own name for the folder in the archive, when it does not know the name of the file
ROOT = "archive"
ALIGN = 64  # as torch aligns storages
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip archive can hold; a fixed one keeps the bytes the same
_LOCAL = 30  # bytes of the local header of a zip entry before its name
Memo = dict[bytes, int]
# opcodes of pickle: REDUCE, TUPLE, MARK, STOP
_CALL, _TUPLE, _MARK, _STOP = b"R", b"t", b"(", b"."

_STORAGES = {dtype: name for name, dtype in STORAGE_DTYPES.items() if name.module == "torch"}
_DTYPES = {dtype: name for name, dtype in TENSOR_DTYPES.items()}


def pickle_bytes(tensors: Mapping[str, LazyArray]) -> Iterator[bytes | memoryview]:
    """The bytes of a torch zip pickle of ``tensors`` in order; each tensor is read when its turn comes.

    Raises
    ------
    FormatError
        torch has no such dtype, or a key is not printable.
    """
    sink = _Sink()
    with ZipFile(sink, "w", ZIP_STORED) as archive:  # type: ignore[call-overload]
        _add(archive, sink, "data.pkl", _state(tensors))
        _add(archive, sink, "byteorder", b"little")
        for number, tensor in enumerate(tensors.values()):
            _add(archive, sink, f"data/{number}", _numbers(tensor))
            yield from sink.drain()
        # torch's version of the container
        _add(archive, sink, "version", b"3\n")
    yield from sink.drain()


def _numbers(tensor: LazyArray) -> memoryview:
    array = np.ascontiguousarray(tensor.read(), _little(tensor.dtype))
    return array.reshape(-1).view(np.uint8).data


def _little(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype


@final
class _Sink:
    """A stream that cannot seek, whose content is taken out in parts."""

    def __init__(self) -> None:
        self.parts: list[bytes | memoryview] = []
        self.count = 0

    def write(self, data: bytes | memoryview) -> int:
        """Append ``data``."""
        self.parts.append(data)
        self.count += len(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing; ZipFile calls it, and `drain` empties the stream."""

    def drain(self) -> list[bytes | memoryview]:
        """Return what was written since the last call."""
        parts, self.parts = self.parts, []
        return parts


def _add(archive: ZipFile, sink: _Sink, name: str, data: bytes | memoryview) -> None:
    """Add one entry whose data begin at a multiple of `ALIGN` bytes."""
    entry = ZipInfo(f"{ROOT}/{name}", _EPOCH)
    entry.create_system, entry.external_attr = 3, 0o600 << 16  # Unix on every system, so that the bytes are the same
    # The padding is an extra field of the entry, as in torch's files; its own header takes 4 bytes.
    taken = sink.count + _LOCAL + len(entry.filename) + 4
    padding = -taken % ALIGN
    entry.extra = pack("<2sH", b"FB", padding) + b"Z" * padding
    archive.writestr(entry, data)
    entry.extra = b""  # the directory at the end needs no padding


def _state(tensors: Mapping[str, LazyArray]) -> bytes:
    """The pickle of the state dict."""
    memo: Memo = {}
    items = [_text(key) + _tensor(key, number, tensor, memo) for number, (key, tensor) in enumerate(tensors.items())]
    return b"\x80\x02}" + _MARK + b"".join(items) + b"u" + _STOP


def _tensor(key: str, number: int, tensor: LazyArray, memo: Memo) -> bytes:
    """The code for one tensor: ``_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)``.

    ``_rebuild_tensor_v3`` has a dtype as well. torch uses it for dtypes without a storage class of their own.
    """
    check_printable(key)
    little = _little(tensor.dtype)
    if little not in _DTYPES:
        raise FormatError(f"{key}: a torch pickle has no {tensor.dtype}", fix="convert it to float32")
    plain = little in _STORAGES
    storage = _STORAGES[little] if plain else Name("torch.storage", "UntypedStorage")
    count = tensor.size if plain else tensor.nbytes
    # Strides of C order, in elements.
    steps = list(accumulate(reversed(tensor.shape), mul, initial=1))[-2::-1]
    make = _once(_global(Name("torch._utils", "_rebuild_tensor_v2" if plain else "_rebuild_tensor_v3")), memo)
    kind = _once(_text("storage"), memo) + _once(_global(storage), memo)
    storage_id = _MARK + kind + _text(str(number)) + _once(_text("cpu"), memo) + _int(count) + _TUPLE + b"Q"
    hooks = _once(_global(Name("collections", "OrderedDict")), memo) + b")" + _CALL
    parts = storage_id + _int(0) + _ints(tensor.shape) + _ints(steps if tensor.shape else ()) + b"\x89" + hooks
    dtype = b"" if plain else _once(_global(_DTYPES[little]), memo)
    return make + _MARK + parts + dtype + _TUPLE + _CALL


def _once(code: bytes, memo: Memo) -> bytes:
    """Code with the effect of ``code``: the first time it stores the object in the memo, later it reads it there."""
    if code in memo:
        return b"h" + pack("<B", memo[code])
    memo[code] = len(memo)  # one byte is enough: only names of functions, dtypes and storages go into the memo
    return code + b"q" + pack("<B", memo[code])


def _global(name: Name) -> bytes:
    return f"c{name.module}\n{name.name}\n".encode("ascii")


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return b"X" + pack("<I", len(data)) + data


def _ints(numbers: Any) -> bytes:
    return _MARK + b"".join(map(_int, numbers)) + _TUPLE


def _int(number: int) -> bytes:
    # The shortest opcode, as torch's pickler chooses it.
    if number < 1 << 8:
        return b"K" + pack("<B", number)
    if number < 1 << 31:
        return b"J" + pack("<i", number)
    data = number.to_bytes(number.bit_length() // 8 + 1, "little")
    return b"\x8a" + pack("<B", len(data)) + data
