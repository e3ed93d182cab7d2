"""The container of ``torch.save`` since torch 1.6: a zip archive with one pickle and one entry for each storage."""

import struct
from io import BytesIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from loralens.errors import FormatError
from loralens.formats.files.container import OpenFile
from loralens.formats.files.relative_name import is_relative_name
from loralens.formats.files.torch.names import CONVERT
from loralens.formats.files.torch.tensor import SAVE_AGAIN, Span
from loralens.formats.files.torch.unpickler import MOST_BYTES, unpickle

MAGIC = b"PK\x03\x04"
# What zipfile raises for damaged archives, besides its own error.
_BROKEN = (BadZipFile, NotImplementedError, ValueError, OverflowError, EOFError, OSError, struct.error)
_LOCAL = struct.Struct("<4s22xHH")  # magic number, length of the name, length of the extra field
_ENCRYPTED, _UTF8 = 0x1, 0x800  # bits of an entry's flags


def load_zip(file: OpenFile) -> tuple[object, dict[str, Span]]:
    """The pickled object of ``file``, and the places of its storages.

    Compressed entries are refused, so no entry is larger than the file.
    """
    spans = {info.filename: _span(file, info) for info in _entries(file)}
    root = _root(spans)
    # Older files have no such entry.
    order = spans.get(f"{root}/byteorder")
    if order and _bytes(file, order) != b"little":
        raise FormatError("its numbers are big-endian", fix="save it again on a little-endian machine")
    state, _ = unpickle(BytesIO(_bytes(file, spans[f"{root}/data.pkl"])))
    data = f"{root}/data/"
    return state, {name.removeprefix(data): span for name, span in spans.items() if name.startswith(data)}


def _entries(file: OpenFile) -> list[ZipInfo]:
    try:
        with ZipFile(file.path) as archive:
            entries = archive.infolist()
    except _BROKEN as error:
        raise FormatError("its zip archive is damaged", fix=SAVE_AGAIN) from error
    # Which of the two is read would depend on the program.
    if len({info.filename for info in entries}) != len(entries):
        raise FormatError("its zip archive holds two entries of the same name", fix=CONVERT)
    return entries


def _root(names: dict[str, Span]) -> str:
    """The name of the one folder in the archive, which holds everything: "archive", or the name of the file."""
    root, *other_roots = {name.partition("/")[0] for name in names} or {""}
    if other_roots or not all(map(is_relative_name, names)):
        what = "its zip archive is not laid out as torch does: more than one folder, or odd names"
        raise FormatError(what, fix=CONVERT)
    # torch.jit writes other archives, with code.
    if f"{root}/data.pkl" not in names:
        fix = "give a file written by torch.save, not a model saved by torch.jit or a zipped folder"
        raise FormatError("it is a zip archive without data.pkl", fix=fix)
    return root


def _span(file: OpenFile, info: ZipInfo) -> Span:
    """The place of an entry's bytes. The entry's own header must agree with the directory of the archive."""
    name = info.filename[:60]
    if info.compress_type != ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & _ENCRYPTED:
        fix = "torch never compresses: unpack the zip and give the file inside it, or save it again"
        raise FormatError(f"its entry {name!a} is compressed or encrypted", fix=fix)
    start, stored_name = info.header_offset, info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
    # An offset is a claim of the archive's directory.
    if start < 0 or start + _LOCAL.size + len(stored_name) > file.size:
        raise FormatError("its zip archive is damaged", fix=SAVE_AGAIN)
    header = file.read(start, _LOCAL.size + len(stored_name))
    magic, name_length, extra_length = _LOCAL.unpack_from(header)
    if magic != MAGIC or name_length != len(stored_name) or not header.endswith(stored_name):
        raise FormatError(f"its entry {name!a} is not where the zip directory says", fix=SAVE_AGAIN)
    # The name and the extra field lie before the data.
    start += _LOCAL.size + name_length + extra_length
    if start + info.file_size > file.size:
        raise FormatError(f"its entry {name!a} ends after the file", fix=SAVE_AGAIN)
    return Span(start, info.file_size)


def _bytes(file: OpenFile, span: Span) -> bytes:
    if span.nbytes > MOST_BYTES:
        raise FormatError(f"its pickle is larger than {MOST_BYTES} bytes", fix=CONVERT)
    return file.read(*span)
