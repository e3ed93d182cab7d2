"""Reading and writing ``.bin``, ``.pt``, ``.pth`` and ``.ckpt`` files with torch, which runs no code of a file.

The file is checked (`torch_check`) before ``torch.load(weights_only=True)`` gets it. torch maps the container that it
writes since version 1.6 into memory, and so tells where each tensor lies in the file, from which we read it when it is
needed. torch loads older files as a whole.
"""

import struct
from collections.abc import Iterator, Mapping
from io import BytesIO
from math import prod
from pathlib import Path
from pickletools import genops
from typing import TYPE_CHECKING, Any, TypeAlias
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import ml_dtypes
import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.errors import FormatError, place
from loralens.formats.files.container import MOST_AXES, OpenFile
from loralens.formats.files.json_text import check_printable
from loralens.requirements import install_command

if TYPE_CHECKING:
    import torch


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

_OPCODES = """
    PROTO NONE NEWTRUE NEWFALSE BININT1 BININT2 BININT LONG1 BINFLOAT BINUNICODE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT MARK
    TUPLE TUPLE1 TUPLE2 TUPLE3 BINPUT LONG_BINPUT BINGET LONG_BINGET APPEND APPENDS SETITEM SETITEMS GLOBAL BINPERSID
    REDUCE BUILD STOP
"""
_OPCODE_NAMES = frozenset(_OPCODES.split())
_DTYPES = """
    float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 bool int64 int32 int16 int8 uint64 uint32 uint16 uint8
"""
DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in _DTYPES.split()}
_STORAGES = "Double Float Half BFloat16 Long Int Short Char Byte Bool"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NAMES = frozenset({
    *("collections OrderedDict", "torch Size", "torch.storage UntypedStorage"),
    *(f"torch._utils _rebuild_{made}" for made in ("parameter", "tensor_v2", "tensor_v3")),
    *(f"torch {name}Storage" for name in _STORAGES.split()),
    *(f"torch {name}" for name in DTYPES),
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
    if name not in _OPCODE_NAMES:
        raise FormatError(f"its pickle holds the opcode {name}, which torch.save does not write", fix=CONVERT)
    if name == "PROTO" and arg != 2:
        fix = "load it with torch and save it again without pickle_protocol, or as safetensors"
        raise FormatError(f"its pickle has protocol {arg}, torch.save writes 2", fix=fix)
    if name == "GLOBAL" and arg not in _NAMES:
        what = f"its pickle asks for {arg.replace(' ', '.')[:100]!a}, which no plain state dict needs"
        raise FormatError(what, fix=CONVERT)
    if step > MOST_STEPS:
        raise FormatError(f"its pickle has more than {MOST_STEPS:,} steps", fix=CONVERT)


Plain: TypeAlias = bool | int | float | str | None
_ONLY_TENSORS = "load it with torch where nothing can be harmed and save only the state dict of the adapter"
# A file could make torch.load(weights_only=True) of older versions run code (CVE-2025-32434, CVE-2026-24747).
OLDEST_TORCH = (2, 10)


def read_pickle(path: Path) -> tuple[dict[str, LazyArray], dict[str, Plain | list[Plain]]]:
    """Read the tensors of a file of ``torch.save``, and the plain values beside them.

    A file that holds its tensors one level down, such as ``{"state_dict": {...}, "epoch": 3}``, is unwrapped: the plain
    values of both levels are returned together. The device that a tensor was saved on does not matter.

    Parameters
    ----------
    path : Path

    Returns
    -------
    tensors : dict of LazyArray
        In the order of the file; each is read from the file when it is needed.
    plain_values : dict
        Numbers, strings, booleans, None, and lists of those (a tuple or torch.Size becomes a list).

    Raises
    ------
    FormatError
        The file is damaged, or would run code, or holds something else; or torch is not installed, or is too old.
    """
    with place(path):
        if not path.is_file():
            raise FormatError("no such file", fix="give the path of a .bin, .pt, .pth or .ckpt file")
        file = OpenFile(path)
        state, mapped = _load(file)
        tensors, plain_values = _split(state)
        arrays = {}
        for key, tensor in tensors.items():
            with place(key):
                arrays[key] = _lazy_array(tensor, file, mapped)
        return arrays, plain_values


def _torch() -> Any:
    """The package torch, or an error that says how to install it."""
    try:
        import torch
    except ImportError as error:
        raise _needs("torch", str(error)) from error
    major, minor = map(int, torch.__version__.split(".")[:2])
    if (major, minor) < OLDEST_TORCH:
        raise _needs("torch>={}.{}".format(*OLDEST_TORCH), f"a file could make {torch.__version__} run its code")
    return torch


def _needs(package: str, reason: str) -> FormatError:
    # Not an OptionError: of many files, only those of torch cannot be read.
    return FormatError(f"a file of torch needs {package} ({reason})", fix=install_command([package]))


def _load(file: OpenFile) -> tuple[object, int | None]:
    """What ``torch.load`` makes of a file, and the address in memory of its first byte if torch maps it."""
    zipped = file.read(0, min(4, file.size)) == MAGIC
    if not file.read(0, min(1, file.size)) == (b"P" if zipped else b"\x80"):
        raise FormatError("it was not written by torch.save", fix="give a .bin, .pt, .pth or .ckpt file of torch")
    entries = [(start, nbytes) for start, nbytes in check_zip(file) if nbytes] if zipped else []
    start, count = (0, 0) if zipped else check_legacy(file)
    torch, storages = _torch(), []

    def keep(storage: Any, _device: str) -> Any:
        storages.append((storage.data_ptr(), storage.nbytes()))
        return storage

    try:
        state = torch.load(file.path, map_location=keep, weights_only=True, mmap=zipped)
    # torch raises errors of many kinds for what is wrong in a file.
    except Exception as error:
        raise FormatError("torch.load does not read it", fix=SAVE_AGAIN) from error
    file.check_unchanged()  # torch has opened it again
    # torch lets a storage go beyond its entry, and would take the bytes after it for numbers.
    filled = sorted((address, nbytes) for address, nbytes in storages if nbytes)
    mapped = filled[0][0] - min(entries)[0] if filled and entries else 0
    if zipped:
        complete = [(address - mapped, nbytes) for address, nbytes in filled] == sorted(entries)
    else:
        complete = count == len(storages) and file.size == start + sum(8 + nbytes for _, nbytes in storages)
    if not complete:
        raise FormatError("its storages do not have the sizes that its pickle says", fix=SAVE_AGAIN)
    return state, mapped if zipped else None


def _split(state: object) -> "tuple[dict[str, torch.Tensor], dict[str, Plain | list[Plain]]]":
    """The tensors and plain values of ``state``, or of the one dict in it that has tensors and what is around it."""
    if not isinstance(state, dict):
        raise FormatError(f"it holds a {type(state).__name__}, not a state dict", fix=_ONLY_TENSORS)
    is_tensor, values = _torch().is_tensor, _checked(state)
    inner = {key: _checked(value) for key, value in values.items() if isinstance(value, dict)}
    inner = {key: value for key, value in inner.items() if any(map(is_tensor, value.values()))}
    # Tensors at the top decide, because a state dict may hold other dicts as values.
    if inner and not any(map(is_tensor, values.values())):
        # The same key could occur in two of them.
        if len(inner) > 1:
            first, second, *_ = inner
            what = f"it holds more than one state dict: {first}, {second}"
            raise FormatError(what, fix="save the one you want alone")
        ((name, inside),) = inner.items()
        del values[name]
        # One of the two values would be lost.
        if twice := values.keys() & inside.keys():
            raise FormatError(f"it holds {min(twice)} inside and beside {name}", fix=_ONLY_TENSORS)
        values |= inside
    tensors, plain_values = {}, dict[str, Plain | list[Plain]]()
    for key, value in values.items():
        if is_tensor(value):
            tensors[key] = value
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(item, int | float | str | None):
                what = f"{key} holds a {type(item).__name__}: neither a tensor nor a plain value"
                raise FormatError(what, fix=_ONLY_TENSORS)
        plain_values[key] = list(value) if isinstance(value, list | tuple) else value
    return tensors, plain_values


def _checked(state: dict[Any, Any]) -> dict[str, Any]:
    # A file may give an OrderedDict attributes that hide its methods; those of dict cannot be hidden.
    items = dict(dict.items(state))
    for key in items:
        if not isinstance(key, str):
            raise FormatError("it has a key that is not a string", fix="save only the state dict of the adapter")
        check_printable(key)
    return items


def _lazy_array(tensor: "torch.Tensor", file: OpenFile, mapped: int | None) -> LazyArray:
    """A tensor as an array that is read from the file, or copied from what torch has loaded, when it is needed."""
    shape = tuple(tensor.shape)
    dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
    # NumPy counts the other sizes of an empty array too.
    if len(shape) > MOST_AXES or prod(n for n in shape if n) * dtype.itemsize >= 2**63:
        raise FormatError("its sizes are too big for any array", fix=SAVE_AGAIN)
    # A stride of 0 repeats numbers. Without this check, four bytes could ask for any amount of memory.
    if prod(shape) * dtype.itemsize > file.size:
        fix = "it repeats its numbers with a stride of 0: save tensor.contiguous() instead"
        raise FormatError("it asks for more memory than the whole file takes", fix=fix)
    # A byte of a bool may be another one than 0 and 1, which NumPy does not take for a bool. A negative view of torch
    # is stored as what it is a view of.
    plain = dtype != np.bool_ and not tensor.is_neg()
    if mapped is not None and plain and tensor.numel() and tensor.is_contiguous():
        return file.array(tensor.data_ptr() - mapped, shape, dtype)
    tensor = tensor.detach()

    def read() -> Array:
        file.read(0, 0)  # refuses a file that became shorter, as reading its map would kill the process
        # NumPy's own functions of torch know neither bfloat16 nor float8.
        bits = tensor.resolve_neg().contiguous().view(getattr(_torch(), f"uint{8 * dtype.itemsize}")).numpy()
        return bits != 0 if dtype == np.bool_ else bits.copy().view(dtype)

    return LazyArray(read, shape=shape, dtype=dtype)


def write_torch(tensors: Mapping[str, LazyArray], stream: Any) -> None:
    """Write what ``torch.save`` makes of a state dict. The same version of torch writes the same bytes.

    Raises
    ------
    FormatError
        torch has no such dtype, or a key is not printable.
    """
    torch, state = _torch(), {}
    for key, tensor in tensors.items():
        check_printable(key)
        dtype = tensor.dtype.newbyteorder("=")
        if dtype not in _DTYPE_NAMES:
            raise FormatError(f"{key}: a torch pickle has no {tensor.dtype}", fix="convert it to float32")
        array = np.array(tensor.read(), dtype, order="C")  # a copy, since torch warns of arrays that are read-only
        bits = torch.from_numpy(array.reshape(-1).view(f"u{dtype.itemsize}"))
        state[key] = bits.view(getattr(torch, _DTYPE_NAMES[dtype])).reshape(tensor.shape)
    try:
        torch.save(state, stream)
    except RuntimeError as error:
        # After an error of the disk, torch closes its archive and complains of the missing bytes.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def torch_size(tensors: Mapping[str, LazyArray]) -> int:
    """The bytes that `write_torch` would write: with zeros, which take as many as other numbers."""
    counted = _Counted()
    zeros = {key: LazyArray.of(np.broadcast_to(np.zeros((), t.dtype), t.shape)) for key, t in tensors.items()}
    write_torch(zeros, counted)
    return counted.size


class _Counted:
    """A stream that counts the bytes that are written to it, and keeps none."""

    size = 0

    def write(self, data: bytes | memoryview) -> int:
        """Count ``data``."""
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing; torch calls it."""
