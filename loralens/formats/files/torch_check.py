"""What a file of torch must fulfil before ``torch.load`` gets it.

``torch.load(weights_only=True)`` runs no code of a file. But a tuple nested 400,000 levels deep as a key of a dict
crashes the process, ``bytearray(2**33)`` takes 8 GB, and a compressed pickle of half a megabyte becomes gigabytes. So
the pickles are looked through first: their opcodes, names and sizes must be those that ``torch.save`` writes.
"""

import struct
from collections.abc import Iterator
from io import BytesIO
from pickletools import genops
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from loralens.errors import FormatError
from loralens.formats.files.container import OpenFile

SAVE_AGAIN = "the file is incomplete or was tampered with: download or save it again"
CONVERT = "ask for a safetensors file, or convert it with torch where nothing can be harmed and save only the tensors"
MAGIC = b"PK\x03\x04"
MOST_BYTES = 1 << 24  # of one pickle: 16 MiB describe more than 100,000 tensors
MOST_STEPS = 1_500_000  # opcodes of one pickle: about 35 for each tensor
MOST_ITEMS = 256  # of a tuple and the tuples in it, since the time and the stack that its hash takes grow with them

# What zipfile raises for damaged archives, besides its own error.
_BROKEN = (BadZipFile, NotImplementedError, RuntimeError, ValueError, OverflowError, EOFError, OSError, struct.error)
_END, _END64 = struct.Struct("<4s16xH"), struct.Struct("<4s4xQ4x")  # the records at the end of a zip archive
_END64_SIZE = 56
_LOCAL = struct.Struct("<26xHH")  # the header of an entry: lengths of the name and of the extra field

_OPCODES = frozenset({
    *("PROTO", "NONE", "NEWTRUE", "NEWFALSE", "BININT1", "BININT2", "BININT", "LONG1", "BINFLOAT", "BINUNICODE"),
    *("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BINPUT"),
    *("LONG_BINPUT", "BINGET", "LONG_BINGET", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "GLOBAL", "BINPERSID"),
    *("REDUCE", "BUILD", "STOP"),
})  # fmt: skip
_DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "bool", "int64", "int32",
           "int16", "int8", "uint64", "uint32", "uint16", "uint8")  # fmt: skip
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_NAMES = frozenset({
    *("collections OrderedDict", "torch Size", "torch.storage UntypedStorage"),
    *(f"torch._utils _rebuild_{made}" for made in ("parameter", "tensor_v2", "tensor_v3")),
    *(f"torch {name}Storage" for name in _STORAGES),
    *(f"torch {name}" for name in _DTYPES),
})  # fmt: skip


def check_zip(file: OpenFile) -> list[tuple[int, int]]:
    """Check the container that torch writes since version 1.6; returns where its storages begin, and their bytes."""
    try:
        _check_end(file)
        with ZipFile(file.path) as archive:
            entries = archive.infolist()
            # torch looks names up without regard to case, and takes offsets from the start of the file.
            if len({entry.filename.lower() for entry in entries}) != len(entries):
                raise FormatError("its zip archive holds two entries of the same name", fix=CONVERT)
            if min((entry.header_offset for entry in entries), default=0):
                raise FormatError("its zip archive does not begin with an entry", fix=SAVE_AGAIN)
            for entry in entries:
                # The lowest bit means that the entry is encrypted.
                if entry.compress_type != ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
                    fix = "torch never compresses: unpack the zip and give the file inside it, or save it again"
                    raise FormatError(f"its entry {entry.filename[:60]!a} is compressed or encrypted", fix=fix)
            found = {entry.filename: entry for entry in entries}
            root = next(iter(found), "").partition("/")[0]
            # torch.jit writes other archives, with code.
            if f"{root}/data.pkl" not in found or f"{root}/constants.pkl" in found:
                fix = "give a file written by torch.save, not a model saved by torch.jit or a zipped folder"
                raise FormatError("it is a zip archive, but not one of torch.save", fix=fix)
            # torch reads the others as a whole.
            others = [entry.file_size for name, entry in found.items() if not name.startswith(f"{root}/data/")]
            if max(others) > MOST_BYTES:
                raise FormatError(f"its pickle is larger than {MOST_BYTES} bytes", fix=CONVERT)
            check_pickle(BytesIO(archive.read(f"{root}/data.pkl")))
            # Older files have no such entry.
            if f"{root}/byteorder" in found and archive.read(f"{root}/byteorder") != b"little":
                raise FormatError("its numbers are big-endian", fix="save it again on a little-endian machine")
    except _BROKEN as error:
        raise FormatError("its zip archive is damaged", fix=SAVE_AGAIN) from error
    storages = [entry for name, entry in found.items() if name.startswith(f"{root}/data/")]
    return [(_data_start(file, entry), entry.file_size) for entry in storages]


def _data_start(file: OpenFile, entry: ZipInfo) -> int:
    """Where the bytes of an entry begin: after its own header, which has a name and an extra field."""
    start = entry.header_offset
    if start + _LOCAL.size > file.size:
        raise FormatError("its zip archive is damaged", fix=SAVE_AGAIN)
    name, extra = _LOCAL.unpack(file.read(start, _LOCAL.size))
    return int(start + _LOCAL.size + name + extra)


def _check_end(file: OpenFile) -> None:
    """Refuse an archive whose directory torch could look for elsewhere than Python does."""
    end = file.size - 22
    signature, comment = _END.unpack(file.read(end, 22)[: _END.size]) if end > 0 else (b"", 0)
    locator, place = _END64.unpack(file.read(end - _END64.size, _END64.size)) if end > 100 else (b"", 0)
    if signature != b"PK\5\6" or comment or (locator == b"PK\6\7" and place != end - _END64.size - _END64_SIZE):
        raise FormatError("its zip archive is damaged", fix=SAVE_AGAIN)


def check_legacy(file: OpenFile) -> tuple[int, int]:
    """Check the five pickles before the storages, as torch wrote them before version 1.6.

    Returns where the storages begin, and how many of them are listed.
    """
    head = BytesIO(file.read(0, min(file.size, MOST_BYTES)))  # no more is read, whatever a length in it claims
    for _ in range(4):
        check_pickle(head)
    # torch leaves a storage that is not listed with whatever was in memory.
    keys = check_pickle(head)
    if len(set(keys)) != len(keys):
        raise FormatError("its list of storages holds one of them twice", fix=SAVE_AGAIN)
    return head.tell(), len(keys)


def check_pickle(stream: BytesIO) -> list[str]:
    """Check the pickle at the start of ``stream``, which is then at its end; returns the texts in it."""
    try:
        return [arg for opcode, arg in _steps(stream) if opcode == "BINUNICODE"]
    # The causes: an empty stack, an unknown memo number, text that is not UTF-8, a number that is cut off, or a
    # backslash in a name, of which Python warns.
    except (IndexError, KeyError, ValueError, struct.error, DeprecationWarning) as error:
        raise FormatError("its pickle is damaged", fix=SAVE_AGAIN) from error


def _steps(stream: BytesIO) -> Iterator[tuple[str, Any]]:
    """The opcodes of a pickle and their arguments, each of which is checked."""
    # Of each object on the stack, and of each in the memo, only this is known: the items of a tuple, or 1.
    stack: list[int] = []
    below: list[list[int]] = []
    memo: dict[Any, int] = {}
    for step, (opcode, arg, _) in enumerate(genops(stream)):
        name = opcode.name
        _check_step(step, name, arg)
        if name == "MARK":
            below.append(stack)
            stack = []
        elif name.endswith("PUT"):
            memo[arg] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[arg])
        elif name.startswith("TUPLE"):
            items = _popped(stack, len(opcode.stack_before)) if name[5:] else stack
            stack = stack if name[5:] else below.pop()
            stack.append(1 + sum(items))
            if stack[-1] > MOST_ITEMS:
                raise FormatError(f"its pickle holds a tuple of more than {MOST_ITEMS} items", fix=CONVERT)
        elif name in ("SETITEMS", "APPENDS"):
            stack = below.pop()
        elif name != "PROTO":
            _popped(stack, len(opcode.stack_before))
            stack += [1] * len(opcode.stack_after)
        yield name, arg


def _popped(stack: list[int], count: int) -> list[int]:
    return [stack.pop() for _ in range(count)]


def _check_step(step: int, name: str, arg: Any) -> None:
    if name not in _OPCODES:
        raise FormatError(f"its pickle holds the opcode {name}, which torch.save does not write", fix=CONVERT)
    if name == "PROTO" and arg != 2:
        fix = "load it with torch and save it again without pickle_protocol, or as safetensors"
        raise FormatError(f"its pickle has protocol {arg}, torch.save writes 2", fix=fix)
    if name == "GLOBAL" and arg not in _NAMES:
        what = f"its pickle asks for {arg.replace(' ', '.')[:100]!a}, which no plain state dict needs"
        raise FormatError(what, fix=CONVERT)
    if step > MOST_STEPS:
        raise FormatError(f"its pickle has more than {MOST_STEPS:,} steps", fix=CONVERT)
