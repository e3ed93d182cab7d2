"""The container of ``torch.save`` before torch 1.6: five pickles, followed by the storages."""

import struct
from io import BytesIO

from loralens.errors import FormatError
from loralens.formats.files.container import OpenFile
from loralens.formats.files.torch.tensor import SAVE_AGAIN, Span, TorchStorage
from loralens.formats.files.torch.unpickler import MOST_BYTES, unpickle

# The magic number and the version of the protocol in torch/serialization.py.
_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_COUNT = struct.Struct("<q")  # elements, before the bytes of each storage


def load_legacy(file: OpenFile) -> tuple[object, dict[str, Span]]:
    """The pickled object of ``file``, and the places of its storages."""
    head = BytesIO(file.read(0, min(file.size, MOST_BYTES)))  # no more is read, whatever a length in it claims
    _check_head(head)
    state, storages = unpickle(head)
    keys, _ = unpickle(head)
    # The order of the storages in the file is that of this list.
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
        raise FormatError("its list of storages is not that of its tensors", fix=SAVE_AGAIN)
    return state, _spans(file, head.tell(), [storages[key] for key in keys])


def _check_head(head: BytesIO) -> None:
    # Protocol 2 begins with this byte. Anything else is a file of another program.
    if not head.getvalue().startswith(b"\x80") or unpickle(head)[0] != _MAGIC or unpickle(head)[0] != _VERSION:
        raise FormatError("it was not written by torch.save", fix="give a .bin, .pt, .pth or .ckpt file of torch")
    system, _ = unpickle(head)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise FormatError("its numbers are big-endian", fix="save it again on a little-endian machine")


def _spans(file: OpenFile, start: int, storages: list[TorchStorage]) -> dict[str, Span]:
    spans = {}
    for storage in storages:
        if start + _COUNT.size > file.size:
            raise FormatError("it ends before its last storage", fix=SAVE_AGAIN)
        (count,) = _COUNT.unpack(file.read(start, _COUNT.size))
        span = Span(start + _COUNT.size, count * storage.dtype.itemsize)
        start = span.start + span.nbytes
        if span.nbytes < 0 or start > file.size:
            raise FormatError(f"storage {storage.key[:40]!a} ends after the file", fix=SAVE_AGAIN)
        spans[storage.key] = span
    return spans
