"""An unpickler for what ``torch.save`` writes, without torch and without the module ``pickle``.

A pickle is a program for a small stack machine. This module is that machine without its dangerous instructions:

- It knows the 31 opcodes that ``torch.save`` writes at protocol 2, its default. Any other opcode is refused by name.
- A name (opcode GLOBAL) is never looked up. It stays a `Name`, a pair of words, and must be in the table `NAMES` of the
  module `names`.
- A call (opcode REDUCE) means one of the five functions in `CALLS` of the module `names`. They check their arguments
  and return a dict, a tuple or a `TorchTensor`. BUILD, which sets attributes, is accepted for a dict and does nothing.
- An opcode allocates no more than a constant times the bytes it was read from: lengths are checked against the bytes
  that are left, and memo numbers must be given out in order.
- Keys of dicts are strings.

A ``pickle.Unpickler`` with its own ``find_class`` would not be safe. In CPython 3.11, nine bytes (a memo number of
2³⁰) make it allocate 16 GB, a tuple nested 400,000 levels deep as a key of a dict crashes the process, and BUILD can
change ``__defaults__`` of any function that ``find_class`` returns.
"""

import pickletools
import struct
from collections.abc import Callable
from io import BytesIO
from typing import Any, cast, final

from loralens.errors import FormatError
from loralens.formats.files.json_text import check_printable
from loralens.formats.files.torch.names import CALLS, CONVERT, NAMES, STORAGE_DTYPES, Name, refuse_unusual
from loralens.formats.files.torch.tensor import SAVE_AGAIN, TorchStorage

MOST_BYTES = 1 << 24  # of one pickle: 16 MiB describe more than 100,000 tensors


def unpickle(stream: BytesIO) -> tuple[object, dict[str, TorchStorage]]:
    """The object that the pickle at the start of ``stream`` describes, and the storages that it names.

    ``stream`` is then at the end of the pickle. The object consists of dict, list, tuple, str, int, float, bool, None,
    `Name`, `TorchStorage` and `TorchTensor`.
    """
    machine = _Machine(stream)
    try:
        return machine.run(), machine.storages
    # The causes: an empty stack, an unknown memo number, text that is not UTF-8, or a number that is cut off.
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise FormatError("its pickle is damaged", fix=SAVE_AGAIN) from error


@final
class _Machine:
    """The state of the stack machine: the stack, the stacks below each mark, the memo, and the remaining bytes."""

    def __init__(self, stream: BytesIO) -> None:
        self.stream = stream
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: list[Any] = []
        self.storages: dict[str, TorchStorage] = {}

    def run(self) -> object:
        """Run up to the opcode STOP; returns the one object that is then on the stack."""
        while (code := self.take(1)) != b".":
            if code not in OPCODES:
                name = next((op.name for op in pickletools.opcodes if op.code.encode("latin-1") == code), code.hex())
                what = f"its pickle holds the opcode {name}, which torch.save does not write"
                raise FormatError(what, fix=CONVERT)
            OPCODES[code](self)
        (result,) = self.stack
        return result

    def take(self, count: int) -> bytes:
        """Take the next ``count`` bytes."""
        # A BytesIO allocates no more than it holds, whatever ``count`` is.
        taken = self.stream.read(count)
        if len(taken) != count:
            raise FormatError("its pickle ends in the middle", fix=SAVE_AGAIN)
        return taken

    def number(self, layout: str) -> Any:
        """Take the next number; ``layout`` is its format in the module struct."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        """Take the text up to the next end of line."""
        line = self.stream.readline()
        return line[:-1].decode("ascii") if line.endswith(b"\n") else refuse_unusual("a name")

    def pop_to_mark(self) -> list[Any]:
        """Remove the last mark and everything above it, and return what was above."""
        above, self.stack = self.stack, self.below.pop()
        return above


def _protocol(machine: _Machine) -> None:
    version = machine.number("<B")
    # Later protocols have opcodes that are not in the table.
    if version != 2:
        fix = "load it with torch and save it again without pickle_protocol, or as safetensors"
        raise FormatError(f"its pickle has protocol {version}, torch.save writes 2", fix=fix)


def _push(make: Callable[[_Machine], object]) -> Callable[[_Machine], None]:
    def push(machine: _Machine) -> None:
        value = make(machine)  # called before the stack is looked up, because TUPLE replaces the stack
        machine.stack.append(value)

    return push


def _text(machine: _Machine) -> str:
    return machine.take(machine.number("<I")).decode()


def _long(machine: _Machine) -> int:
    return int.from_bytes(machine.take(machine.number("<B")), "little", signed=True)


def _mark(machine: _Machine) -> None:
    machine.below.append(machine.stack)
    machine.stack = []


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def pack(machine: _Machine) -> None:
        cut = len(machine.stack) - count
        if cut < 0:  # a negative index would count from the end
            raise IndexError(cut)
        machine.stack[cut:] = [tuple(machine.stack[cut:])]

    return pack


def _put(layout: str) -> Callable[[_Machine], None]:
    def put(machine: _Machine) -> None:
        # torch.save numbers its memo 0, 1, 2 …, so a list is enough and nothing is allocated by a large number.
        if machine.number(layout) != len(machine.memo):
            refuse_unusual("an entry of its memo")
        machine.memo.append(machine.stack[-1])

    return put


def _extend(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, list):
        refuse_unusual("a list")
    target.extend(items)


def _update(machine: _Machine, items: list[Any]) -> None:
    target, keys = machine.stack[-1], items[::2]
    if not isinstance(target, dict) or len(items) % 2:
        refuse_unusual("a dict")
    # The keys are checked before the update, which hashes them: a deeply nested tuple would crash the process.
    for key in keys:
        if not isinstance(key, str):
            raise FormatError("it has a key that is not a string", fix="save only the state dict of the adapter")
        check_printable(key)
    target.update(zip(keys, items[1::2], strict=True))


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _update(machine, [key, value])


def _name(machine: _Machine) -> Name:
    name = Name(machine.line(), machine.line())
    if name not in NAMES:
        raise FormatError(f"its pickle asks for {str(name)!a:.100}, which no plain state dict needs", fix=CONVERT)
    return name


def _call(machine: _Machine) -> None:
    args, function = machine.stack.pop(), machine.stack.pop()
    if not isinstance(function, Name) or function not in CALLS or not isinstance(args, tuple):
        refuse_unusual("a call")
    try:
        machine.stack.append(CALLS[function](*args))
    except ValueError:  # too few or too many arguments
        refuse_unusual(str(function))


def _build(machine: _Machine) -> None:
    # The argument is the _metadata of an OrderedDict: versions of torch's modules, which do not matter here.
    machine.stack.pop()
    if not isinstance(machine.stack[-1], dict):
        refuse_unusual("attributes")


def _storage(machine: _Machine) -> TorchStorage:
    match machine.stack.pop():
        case ("storage", Name() as kind, str(key), _, int(count), *view) if kind in STORAGE_DTYPES and not any(view):
            dtype = STORAGE_DTYPES[kind]
            return machine.storages.setdefault(key, TorchStorage(key, dtype, count * dtype.itemsize))
        case _:
            return cast(TorchStorage, refuse_unusual("a storage"))


# the opcodes that torch.save writes at protocol 2, and no others
OPCODES: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _protocol,  # PROTO
    b"N": _push(lambda _: None),  # NONE
    b"\x88": _push(lambda _: True),  # NEWTRUE
    b"\x89": _push(lambda _: False),  # NEWFALSE
    b"K": _push(lambda machine: machine.number("<B")),  # BININT1
    b"M": _push(lambda machine: machine.number("<H")),  # BININT2
    b"J": _push(lambda machine: machine.number("<i")),  # BININT
    b"\x8a": _push(_long),  # LONG1
    b"G": _push(lambda machine: machine.number(">d")),  # BINFLOAT
    b"X": _push(_text),  # BINUNICODE
    b")": _push(lambda _: ()),  # EMPTY_TUPLE
    b"]": _push(lambda _: []),  # EMPTY_LIST
    b"}": _push(lambda _: {}),  # EMPTY_DICT
    b"(": _mark,  # MARK
    b"t": _push(lambda machine: tuple(machine.pop_to_mark())),  # TUPLE
    b"\x85": _tuple_of(1),  # TUPLE1
    b"\x86": _tuple_of(2),  # TUPLE2
    b"\x87": _tuple_of(3),  # TUPLE3
    b"q": _put("<B"),  # BINPUT
    b"r": _put("<I"),  # LONG_BINPUT
    b"h": _push(lambda machine: machine.memo[machine.number("<B")]),  # BINGET
    b"j": _push(lambda machine: machine.memo[machine.number("<I")]),  # LONG_BINGET
    b"a": lambda machine: _extend(machine, [machine.stack.pop()]),  # APPEND
    b"e": lambda machine: _extend(machine, machine.pop_to_mark()),  # APPENDS
    b"s": _set_item,  # SETITEM
    b"u": lambda machine: _update(machine, machine.pop_to_mark()),  # SETITEMS
    b"c": _push(_name),  # GLOBAL
    b"Q": _push(_storage),  # BINPERSID
    b"R": _call,  # REDUCE
    b"b": _build,  # BUILD
}
