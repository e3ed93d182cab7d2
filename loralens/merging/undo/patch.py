"""The patch that makes unmerging exact: what W is, given R = round(W' − D) that subtracting gives.

Two codings of one tensor, streamed block by block in the order of its rows:

    patch   Where R is not W, and by how many units in the last place: gaps between such entries as bytes (255: go on),
            differences as int8 (−128: the whole number follows in a third stream). Each stream deflated.
    xor     The bits of R XOR those of W, each byte of the number in a stream of its own, deflated. For tensors of which
            nothing but a copy would do; never larger than a copy by more than 0.1 %.

One unit in one entry of 20, 5 or 2 costs 0.36, 1.10 or 1.92 bits a weight as a patch and 0.66, 1.64 or 2.61 as a xor
(bf16), so how far the entries are off decides, not how many are.

Gaps and differences are all but random bytes, in which deflate finds no matches but runs: told to look for nothing else
(Z_RLE) it is ten times as fast, and 1 to 15 % smaller.

Bits are compared, not values: −0, NaN and its payload come back.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import Array, LazyArray, joined
from loralens.errors import FormatError

Coding = Literal["patch", "xor"]
Bytes = NDArray[np.uint8]
Keep = Callable[[bytes], LazyArray]

MANY = 1 / 12  # share of entries beyond int8 that makes a xor the smaller one
ESCAPE = -128
PIECE = 1 << 20  # bytes of a stream that are held at a time
_DAMAGED = "the undo file is damaged: unmerge with --adapter, or take the base from where it came"


@final
@dataclass(frozen=True, slots=True)
class Blob:
    """One tensor's patch: how it is coded, how many entries differ, its deflated streams, which may lie in a file."""

    coding: Coding
    different: int
    streams: tuple[LazyArray, ...]  # uint8

    @property
    def nbytes(self) -> int:
        """Bytes of the streams."""
        return sum(stream.nbytes for stream in self.streams)


def bits(array: Array) -> NDArray[Any]:
    """The bit patterns of floats as unsigned integers, flat, C order."""
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")


def in_memory(data: bytes) -> LazyArray:
    """Bytes as an array."""
    return LazyArray.of(np.frombuffer(data, np.uint8))


@final
@dataclass(slots=True)
class PatchWriter:
    """Takes the rows of W and of R in order; the first block decides the coding.

    Parameters
    ----------
    itemsize : int
        Bytes of one weight: 1, 2, 4 or 8.
    keep : callable
        Puts bytes away, a MiB and more at a time, and gives the array that reads them back: a patch can be as large as
        its tensor.
    """

    itemsize: int
    keep: Keep = in_memory
    _coding: Coding | None = None
    _different: int = 0
    _streams: "list[_Deflate]" = field(default_factory=list)
    _since: int = 0  # entries since the last different one

    def block(self, W: Array, R: Array) -> None:
        """The next rows."""
        w, r = bits(W), bits(R)
        places = np.flatnonzero(w != r)
        units = _ordered(w[places]) - _ordered(r[places])  # modulo 2**bits
        signed = units.view(f"i{self.itemsize}")
        near = (signed > ESCAPE) & (signed < -ESCAPE)
        if self._coding is None:
            self._coding = "xor" if np.count_nonzero(~near) > MANY * w.size else "patch"
            self._streams = [_Deflate(self.keep) for _ in range(3 if self._coding == "patch" else self.itemsize)]
        self._different += places.size
        if self._coding == "xor":
            planes = (w ^ r).view(np.uint8).reshape(-1, self.itemsize)
            for stream, plane in zip(self._streams, planes.T, strict=True):
                stream.take(np.ascontiguousarray(plane))
            return
        gaps = np.diff(places, prepend=-1) - 1
        if places.size:
            gaps[0] += self._since
        self._since = int(w.size - 1 - places[-1]) if places.size else self._since + w.size
        self._streams[0].take(_spread(gaps))
        self._streams[1].take(np.where(near, signed, ESCAPE).astype(np.int8).view(np.uint8))
        self._streams[2].take(np.ascontiguousarray(units[~near]).view(np.uint8))

    def finish(self) -> Blob:
        """The patch of the whole tensor."""
        return Blob(self._coding or "patch", self._different, tuple(stream.end() for stream in self._streams))


@final
class PatchReader:
    """Gives W back from R, block by block in the same order; the blocks may be cut otherwise.

    Of the streams only what the next block needs is inflated.
    """

    __slots__ = ("_coding", "_different", "_done", "_entries", "_planes")

    def __init__(self, blob: Blob, itemsize: int) -> None:
        self._coding, self._different, self._done = blob.coding, blob.different, 0
        if len(blob.streams) not in (0, 3 if blob.coding == "patch" else itemsize):
            raise FormatError(f"a {blob.coding} of {len(blob.streams)} streams", fix=_DAMAGED)
        streams = [_Inflate(stream) for stream in blob.streams]
        self._planes = streams if blob.coding == "xor" else []
        self._entries = _Entries(*streams, itemsize=itemsize) if blob.coding == "patch" and streams else None

    def block(self, R: Array) -> Array:
        """The rows of W that stand where these rows of R do, same dtype and shape."""
        r = bits(R).copy()
        if self._planes:
            planes = [plane.take(r.size) for plane in self._planes]
            r ^= np.ascontiguousarray(np.stack(planes, axis=1)).reshape(-1).view(r.dtype)
        elif self._entries:
            places, units = self._entries.before(self._done + r.size)
            here = places - self._done
            r[here] = _unordered(_ordered(r[here]) + units)
        self._done += r.size
        return r.view(R.dtype).reshape(R.shape)

    def finish(self) -> None:
        """Raise FormatError unless everything was used."""
        left = [not plane.ended for plane in self._planes]
        if self._entries:
            left.append(not self._entries.ended)
            if self._entries.count != self._different:
                raise FormatError("the streams of a patch do not fit each other", fix=_DAMAGED)
        if any(left):
            raise FormatError("a patch reaches beyond its tensor", fix=_DAMAGED)


@final
class _Deflate:
    """Deflates a stream, and puts away what comes of it a MiB at a time."""

    __slots__ = ("_engine", "_keep", "_kept", "_parts", "_size")

    def __init__(self, keep: Keep) -> None:
        self._engine, self._keep = zlib.compressobj(strategy=zlib.Z_RLE), keep
        self._parts, self._size, self._kept = list[bytes](), 0, list[LazyArray]()

    def take(self, data: Bytes) -> None:
        self._add(self._engine.compress(data.data))
        if self._size > PIECE:
            self._put_away()

    def end(self) -> LazyArray:
        self._add(self._engine.flush())
        self._put_away()
        return self._kept[0] if len(self._kept) == 1 else joined(self._kept)

    def _add(self, part: bytes) -> None:
        self._parts.append(part)
        self._size += len(part)

    def _put_away(self) -> None:
        self._kept.append(self._keep(b"".join(self._parts)))
        self._parts, self._size = [], 0


@final
class _Inflate:
    """A deflated stream, read some bytes at a time: neither it nor what it unfolds to need fit into memory."""

    __slots__ = ("_at", "_engine", "_rest", "_stream")

    def __init__(self, stream: LazyArray) -> None:
        self._engine, self._stream, self._at, self._rest = zlib.decompressobj(), stream, 0, b""

    def some(self, count: int) -> Bytes:
        """The next bytes, at most ``count`` of them; none at the end."""
        while True:
            if not self._rest:
                stop = min(self._at + PIECE, self._stream.size)
                self._rest, self._at = self._stream.rows(self._at, stop).read().tobytes(), stop
            try:
                part = self._engine.decompress(self._rest, count)
            except zlib.error as error:
                raise FormatError(f"a stream of a patch cannot be inflated ({error})", fix=_DAMAGED) from error
            self._rest = self._engine.unconsumed_tail
            if part or self._engine.eof or not (self._rest or self._at < self._stream.size):
                return np.frombuffer(part, np.uint8)

    def take(self, count: int) -> Bytes:
        """The next ``count`` bytes."""
        parts, missing = [], count
        while missing:
            part = self.some(missing)
            if not part.size:
                raise FormatError("a stream of a patch is too short", fix=_DAMAGED)
            parts.append(part)
            missing -= part.size
        return np.concatenate(parts) if parts else np.empty(0, np.uint8)

    @property
    def ended(self) -> bool:
        """Whether nothing is left, and the end is one."""
        return not self.some(1).size and self._engine.eof


@final
class _Entries:
    """The entries in which W is not R: their places, and how many units W is away, in the order of the places."""

    __slots__ = ("_far", "_gaps", "_itemsize", "_last", "_near", "_places", "_sum", "_units", "count")

    def __init__(self, gaps: _Inflate, near: _Inflate, far: _Inflate, *, itemsize: int) -> None:
        self._gaps, self._near, self._far, self._itemsize = gaps, near, far, itemsize
        self._places, self._units = np.empty(0, np.int64), np.empty(0, f"u{itemsize}")
        self._sum = self._last = self.count = 0

    def before(self, stop: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Places below ``stop`` that were not given yet, and their units."""
        while (not self._places.size or self._places[-1] < stop) and self._decode():
            pass
        end = int(np.searchsorted(self._places, stop))
        here = self._places[:end], self._units[:end]
        self._places, self._units = self._places[end:], self._units[end:]
        return here

    def _decode(self) -> bool:
        """Some more of them; whether there were any bytes left. A gap of 255 and more takes several bytes."""
        data = self._gaps.some(PIECE >> 4)
        if not data.size:
            return False
        ends = np.flatnonzero(data != 255)
        sums = np.cumsum(data, dtype=np.int64)
        places = self._sum + sums[ends] + self.count + np.arange(ends.size)
        self._sum, self._last = self._sum + int(sums[-1]), int(data[-1])
        self.count += ends.size
        near = self._near.take(ends.size).view(np.int8)
        units = near.astype(f"i{self._itemsize}").view(f"u{self._itemsize}")
        escaped = near == ESCAPE
        units[escaped] = self._far.take(int(np.count_nonzero(escaped)) * self._itemsize).view(units.dtype)
        self._places, self._units = np.concatenate([self._places, places]), np.concatenate([self._units, units])
        return True

    @property
    def ended(self) -> bool:
        """Whether all of them were given."""
        if self._last == 255:
            raise FormatError("the places of a patch end in the middle of one", fix=_DAMAGED)
        return not self._places.size and all(stream.ended for stream in (self._gaps, self._near, self._far))


def _ordered(b: NDArray[Any]) -> NDArray[Any]:
    """Bit patterns renumbered so that neighbouring floats have neighbouring numbers, −0 just below 0."""
    top = b.dtype.type(1 << (8 * b.dtype.itemsize - 1))
    return np.where(b & top, ~b, b | top)


def _unordered(o: NDArray[Any]) -> NDArray[Any]:
    """The inverse of `_ordered`."""
    top = o.dtype.type(1 << (8 * o.dtype.itemsize - 1))
    return np.where(o & top, o & ~top, ~o)


def _spread(gaps: NDArray[np.int64]) -> Bytes:
    """Gaps as bytes: 255 stands for 255 and says that more follows."""
    ends = np.cumsum(gaps // 255 + 1)
    out = np.full(int(ends[-1]) if ends.size else 0, 255, np.uint8)
    out[ends - 1] = gaps % 255
    return out
