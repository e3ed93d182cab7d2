"""Reading the header of a GGUF file: counts, names and key-values, none of which is trusted before it is checked."""

import struct
from collections.abc import Iterator
from typing import Any, final

from loralens.errors import FormatError, place
from loralens.formats.files.container import HEADER_LIMIT, OpenFile
from loralens.formats.files.gguf.values import ARRAY, NAMES, SCALARS, TEXT, Value
from loralens.formats.files.json_text import NAME_LIMIT, check_printable

MAGIC = b"GGUF"
# Version 1 had 32-bit counts and was never used for adapters; 3 only adds big-endian files.
VERSIONS = (2, 3)
MOST_ITEMS = 1_000_000  # of one array: an adapter holds a few tokens (aLoRA), but never a vocabulary
CHUNK = 1 << 16  # bytes of the header that are read at a time, because most values are only a few bytes
MANY = 1 << 20  # bytes that are read at a time where a long list of texts is skipped
BROKEN = "the file is damaged: download or convert it again"


@final
class Header:
    """A reader of the bytes before the numbers, from the first to the last.

    ``at`` is the position of the next byte.
    """

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._held, self._start = b"", 0
        self.at = 0

    @property
    def remaining(self) -> int:
        """The number of bytes that have not been taken yet, at most those of the largest header."""
        return min(self._file.size, HEADER_LIMIT) - self.at

    def take(self, count: int) -> bytes:
        """Take the next ``count`` bytes."""
        if count > self.remaining:
            left = max(self.remaining, 0)
            raise FormatError(f"the header needs {count:,} bytes at {self.at:,}, but {left:,} are left", fix=BROKEN)
        # The bytes that are in memory do not reach far enough.
        if self.at + count > self._start + len(self._held):
            self._held = self._file.read(self.at, min(max(count, CHUNK), self._file.size - self.at))
            self._start = self.at
        begin = self.at - self._start
        self.at += count
        return self._held[begin : begin + count]

    def number(self, code: str) -> Any:
        """Take the next number; ``code`` is its type in the struct module."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def skip(self, count: int) -> None:
        """Skip the next ``count`` bytes without reading them."""
        if count > self.remaining:
            raise FormatError(f"the header needs {count:,} bytes at {self.at:,}: too many", fix=BROKEN)
        self.at += count

    def skip_texts(self, count: int) -> None:
        """Skip the next ``count`` texts. Only lengths are decoded: a vocabulary has a quarter of a million texts."""
        while count:
            data = self._file.read(self.at, min(MANY, max(self.remaining, 0)))
            position = 0
            while count and position + 8 <= len(data):
                position += 8 + int.from_bytes(data[position : position + 8], "little")
                count -= 1
            # Fewer than 8 bytes are left, which hold no length.
            if not position:
                raise FormatError("a list of texts ends before its last one", fix=BROKEN)
            self.skip(position)

    def text(self) -> str:
        """Take the next text: its length, then its bytes in UTF-8."""
        data = self.take(self.number("Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{data[:20]!r} is not UTF-8", fix=BROKEN) from error

    def name(self) -> str:
        """Take the next text as a name: it must be short and printable."""
        # The length is checked before the bytes are taken, and then read again by `text`.
        length = self.number("Q")
        if length > NAME_LIMIT:
            raise FormatError(f"a name claims {length:,} bytes", fix=BROKEN)
        self.at -= 8
        name = self.text()
        check_printable(name)
        return name


def read_counts(header: Header) -> tuple[int, int]:
    """Read the numbers of tensors and key-values that the file claims."""
    if header.take(4) != MAGIC:
        raise FormatError("does not begin as a GGUF file", fix="give a GGUF file")
    version = header.number("I")
    if version not in VERSIONS:
        big = version and not version & 0xFFFF  # a small number in big-endian order has zeros in its low bytes
        raise FormatError(
            f"is GGUF {'in big-endian order' if big else f'version {version}'}, but only versions 2 and 3 in "
            "little-endian order can be read",
            fix="convert it again with a current llama.cpp",
        )
    tensors, values = header.number("Q"), header.number("Q")
    # Each takes at least 12 bytes: the length of its name (8) and a type (4).
    if tensors + values > header.remaining // 12:
        raise FormatError(f"claims {tensors:,} tensors and {values:,} key-values: too many", fix=BROKEN)
    return tensors, values


def read_values(header: Header, count: int, *, longest: int | None = None) -> Iterator[tuple[str, Value]]:
    """Read the key-values in the order of the file.

    Parameters
    ----------
    header : Header
    count : int
    longest : int, optional
        Arrays of more items than this are skipped, and their value is None. Reading the vocabulary of a model would
        take a second.
    """
    keys = set()
    for _ in range(count):
        key = header.name()
        if key in keys:
            raise FormatError(f"{key} appears twice", fix=BROKEN)
        keys.add(key)
        with place(key):
            yield key, _value(header, longest)


def _value(header: Header, longest: int | None) -> Value:
    kind = header.number("I")
    if kind != ARRAY:
        return Value(_name(kind), array=False, value=_item(header, kind))
    kind, count = header.number("I"), header.number("Q")
    name = _name(kind)
    if longest is not None and count > longest:
        if kind == TEXT:
            header.skip_texts(count)
        else:
            header.skip(count * struct.calcsize(SCALARS[kind][1]))
        return Value(name, array=True, value=None)
    if count > MOST_ITEMS:
        raise FormatError(f"an array claims {count:,} values", fix="give an adapter, not a model")
    return Value(name, array=True, value=[_item(header, kind) for _ in range(count)])


def _name(kind: int) -> str:
    if kind not in NAMES:
        what = "an array of arrays" if kind == ARRAY else f"a value of type {kind}"
        raise FormatError(f"{what} does not occur in GGUF files of models and adapters", fix=BROKEN)
    return NAMES[kind]


def _item(header: Header, kind: int) -> Any:
    return header.text() if kind == TEXT else header.number(SCALARS[kind][1])
