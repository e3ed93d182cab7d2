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
from dataclasses import dataclass, field
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import Array
from loralens.errors import FormatError

Coding = Literal["patch", "xor"]
Bytes = NDArray[np.uint8]

MANY = 1 / 12  # share of entries beyond int8 that makes a xor the smaller one
ESCAPE = -128
_DAMAGED = "the undo file is damaged: unmerge with --adapter, or take the base from where it came"


@final
@dataclass(frozen=True, slots=True)
class Blob:
    """One tensor's patch: how it is coded, how many entries differ, and its deflated streams."""

    coding: Coding
    different: int
    streams: tuple[bytes, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the streams."""
        return sum(map(len, self.streams))


def bits(array: Array) -> NDArray[Any]:
    """The bit patterns of floats as unsigned integers, flat, C order."""
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")


@final
@dataclass(slots=True)
class PatchWriter:
    """Takes the rows of W and of R in order; the first block decides the coding.

    Parameters
    ----------
    itemsize : int
        Bytes of one weight: 1, 2, 4 or 8.
    """

    itemsize: int
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
            self._streams = [_Deflate() for _ in range(3 if self._coding == "patch" else self.itemsize)]
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
    """Gives W back from R, block by block in the same order; the blocks may be cut otherwise."""

    __slots__ = ("_coding", "_done", "_itemsize", "_places", "_planes", "_units")

    def __init__(self, blob: Blob, itemsize: int) -> None:
        self._coding, self._itemsize, self._done = blob.coding, itemsize, 0
        if len(blob.streams) not in (0, 3 if blob.coding == "patch" else itemsize):
            raise FormatError(f"a {blob.coding} of {len(blob.streams)} streams", fix=_DAMAGED)
        if blob.coding == "xor":
            self._planes = [_Inflate(stream) for stream in blob.streams]
            return
        gaps, near, far = map(_inflated, blob.streams or (zlib.compress(b""),) * 3)
        self._places = _gathered(gaps)
        units = near.view(np.int8).astype(f"i{itemsize}").view(f"u{itemsize}")
        escaped = near.view(np.int8) == ESCAPE
        if not (len(units) == len(self._places) == blob.different and escaped.sum() * itemsize == len(far)):
            raise FormatError("the streams of a patch do not fit each other", fix=_DAMAGED)
        units[escaped] = far.view(f"u{itemsize}")
        self._units = units

    def block(self, R: Array) -> Array:
        """The rows of W that stand where these rows of R do, same dtype and shape."""
        r = bits(R).copy()
        if self._coding == "xor":
            planes = [plane.take(r.size) for plane in self._planes]
            r ^= np.ascontiguousarray(np.stack(planes, axis=1)).reshape(-1).view(r.dtype)
        else:
            first, last = np.searchsorted(self._places, [self._done, self._done + r.size])
            here = self._places[first:last] - self._done
            r[here] = _unordered(_ordered(r[here]) + self._units[first:last])
        self._done += r.size
        return r.view(R.dtype).reshape(R.shape)

    def finish(self) -> None:
        """Raise FormatError unless everything was used."""
        left = self._places[-1:] >= self._done if self._coding == "patch" else [not p.empty for p in self._planes]
        if np.any(left):
            raise FormatError("a patch reaches beyond its tensor", fix=_DAMAGED)


@final
class _Deflate:
    __slots__ = ("_engine", "_parts")

    def __init__(self) -> None:
        self._engine, self._parts = zlib.compressobj(strategy=zlib.Z_RLE), list[bytes]()

    def take(self, data: Bytes) -> None:
        self._parts.append(self._engine.compress(data.data))

    def end(self) -> bytes:
        return b"".join([*self._parts, self._engine.flush()])


@final
class _Inflate:
    """A deflated stream, read some bytes at a time: what it unfolds to need not fit into memory."""

    __slots__ = ("_engine", "_rest")

    def __init__(self, data: bytes) -> None:
        self._engine, self._rest = zlib.decompressobj(), data

    def take(self, count: int) -> Bytes:
        parts, missing = [], count
        while missing:
            try:
                part = self._engine.decompress(self._rest, missing)
            except zlib.error as error:
                raise FormatError(f"a stream of a patch cannot be inflated ({error})", fix=_DAMAGED) from error
            self._rest = self._engine.unconsumed_tail
            if not part:
                raise FormatError("a stream of a patch is too short", fix=_DAMAGED)
            parts.append(part)
            missing -= len(part)
        return np.frombuffer(b"".join(parts), np.uint8)

    @property
    def empty(self) -> bool:
        return not self._rest and not self._engine.decompress(b"", 1)


def _inflated(stream: bytes) -> Bytes:
    try:
        return np.frombuffer(zlib.decompress(stream), np.uint8)
    except zlib.error as error:
        raise FormatError(f"a stream of a patch cannot be inflated ({error})", fix=_DAMAGED) from error


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


def _gathered(stream: Bytes) -> NDArray[np.int64]:
    """Places from such bytes."""
    if stream.size and stream[-1] == 255:
        raise FormatError("the places of a patch end in the middle of one", fix=_DAMAGED)
    ends = np.flatnonzero(stream != 255)
    sums = np.cumsum(stream, dtype=np.int64)[ends]
    return sums + np.arange(ends.size)
