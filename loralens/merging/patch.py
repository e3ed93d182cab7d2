"""The patch that makes unmerging exact: it turns R = round(W' − D), the result of subtracting, into W.

There are two codings of a tensor. Both are written and read block by block in the order of the rows:

    patch   The entries in which R differs from W, and by how many units in the last place. Gaps between such entries
            are bytes (255 means that the gap continues). Differences are int8 (−128 means that the whole number follows
            in a third stream). Each stream is deflated.
    xor     The bits of R XOR those of W. Each byte of the numbers has a stream of its own, which is deflated. This
            coding is for tensors that need nearly a full copy. It is at most 0.1 % larger than a copy.

If one entry in 20, in 5 or in 2 differs by one unit, ``patch`` takes 0.36, 1.10 or 1.92 bits per weight, and ``xor``
0.66, 1.64 or 2.61 (bf16). So the size of the differences decides which coding is better, not their number.

Gaps and differences are almost random bytes, in which deflate finds no matches except runs. Restricted to runs (Z_RLE)
it is ten times as fast, and the result is 1 to 15 % smaller.

Bits are compared, not values, so that −0 and NaN with its payload are restored too.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import Array, LazyArray, concatenate
from loralens.errors import FormatError
from loralens.linalg.order_statistics import few_true

Coding = Literal["patch", "xor"]
Bytes = NDArray[np.uint8]
Keep = Callable[[bytes], LazyArray]

# A difference beyond int8 costs its whole number in addition to the gap and the escape code.
MANY = 1 / 12  # if a larger share of the entries has such a difference, ``xor`` is smaller
# The only int8 number whose negative is not an int8 number; without it the range of differences is symmetric.
ESCAPE = -128
# Large enough that the overhead of each write does not matter.
PIECE = 1 << 20  # bytes of a stream in memory at a time
_DAMAGED = "the undo file is damaged: unmerge with --adapter, or get the base model again"


@final
@dataclass(frozen=True, slots=True)
class Blob:
    """The patch of one tensor: its coding, the number of entries that differ, and the deflated streams."""

    coding: Coding
    different: int
    streams: tuple[LazyArray, ...]  # uint8

    @property
    def nbytes(self) -> int:
        """Total size of the streams in bytes."""
        return sum(stream.nbytes for stream in self.streams)


def bits(array: Array) -> NDArray[Any]:
    """The bit patterns of floats as a flat array of unsigned integers, in C order."""
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")


def keep_in_memory(data: bytes) -> LazyArray:
    """Keep the bytes of a stream in memory, as an array."""
    return LazyArray.of(np.frombuffer(data, np.uint8))


@final
@dataclass(slots=True)
class PatchWriter:
    """Writes a patch from the rows of W and R in order.

    Parameters
    ----------
    itemsize : int
        Bytes of one weight: 1, 2, 4 or 8.
    keep : callable
        Stores bytes, about 1 MiB at a time, and returns the array that reads them back. A patch can be as large as its
        tensor, so it may have to go to a file.
    """

    itemsize: int
    keep: Keep = keep_in_memory
    _coding: Coding | None = None
    _different: int = 0
    _streams: "list[_Deflate]" = field(default_factory=list)
    _since: int = 0  # entries since the last different one

    def block(self, W: Array, R: Array) -> None:
        """Add the next rows of W and R."""
        w, r = bits(W), bits(R)
        # Bit patterns are compared, because as numbers −0 equals 0, and NaN differs from itself.
        places = few_true(w != r)
        units = _to_ordinals(w[places]) - _to_ordinals(r[places])  # modulo 2**bits
        signed = units.view(f"i{self.itemsize}")
        near = (signed > ESCAPE) & (signed < -ESCAPE)
        # Decided once, as the streams of the two codings differ; the first block is typical of the tensor.
        if self._coding is None:
            self._coding = "xor" if np.count_nonzero(~near) > MANY * w.size else "patch"
        if not self._streams:
            self._streams = [_Deflate(self.keep) for _ in range(3 if self._coding == "patch" else self.itemsize)]
        self._different += places.size
        if self._coding == "xor":
            planes = (w ^ r).view(np.uint8).reshape(-1, self.itemsize)
            for stream, plane in zip(self._streams, planes.T, strict=True):
                stream.take(np.ascontiguousarray(plane))
            return
        gaps = np.diff(places, prepend=-1) - 1
        # A gap may begin in an earlier block.
        if places.size:
            gaps[0] += self._since
        self._since = int(w.size - 1 - places[-1]) if places.size else self._since + w.size
        self._streams[0].take(_encode_gaps(gaps))
        self._streams[1].take(np.where(near, signed, ESCAPE).astype(np.int8).view(np.uint8))
        self._streams[2].take(np.ascontiguousarray(units[~near]).view(np.uint8))

    def finish(self) -> Blob:
        """End the streams and return the patch of the whole tensor."""
        return Blob(self._coding or "patch", self._different, tuple(stream.end() for stream in self._streams))


@final
class PatchReader:
    """Restores W from R, block by block in the order of the rows. The blocks may differ from those of the writer.

    Only the part of the streams that the next block needs is inflated.
    """

    def __init__(self, blob: Blob, itemsize: int) -> None:
        self._coding, self._different, self._done = blob.coding, blob.different, 0
        # A tensor without rows has no streams, since nothing was written.
        if len(blob.streams) not in (0, 3 if blob.coding == "patch" else itemsize):
            raise FormatError(f"a {blob.coding} has {len(blob.streams)} streams", fix=_DAMAGED)
        streams = [_Inflate(stream) for stream in blob.streams]
        self._planes = streams if blob.coding == "xor" else []
        self._entries = _Entries(*streams, itemsize=itemsize) if blob.coding == "patch" and streams else None

    def block(self, R: Array) -> Array:
        """The rows of W for the next rows of R, with the same dtype and shape."""
        r = bits(R).copy()
        if self._planes:
            planes = [plane.take(r.size) for plane in self._planes]
            r ^= np.ascontiguousarray(np.stack(planes, axis=1)).reshape(-1).view(r.dtype)
        elif self._entries:
            places, units = self._entries.before(self._done + r.size)
            positions = places - self._done
            r[positions] = _from_ordinals(_to_ordinals(r[positions]) + units)
        self._done += r.size
        return r.view(R.dtype).reshape(R.shape)

    def finish(self) -> None:
        """Check at the end that all of the patch was used; raise FormatError if not."""
        unfinished = [not plane.ended for plane in self._planes]
        if self._entries:
            unfinished.append(not self._entries.ended)
            if self._entries.count != self._different:
                raise FormatError("the streams of a patch do not fit each other", fix=_DAMAGED)
        if any(unfinished):
            raise FormatError("a patch reaches beyond its tensor", fix=_DAMAGED)


@final
class _Deflate:
    """Deflates a stream and stores the result, about 1 MiB at a time."""

    def __init__(self, keep: Keep) -> None:
        # The default level: see the head of the file for the strategy.
        self._engine, self._keep = zlib.compressobj(strategy=zlib.Z_RLE), keep
        self._waiting, self._kept = bytearray(), list[LazyArray]()

    def take(self, data: Bytes) -> None:
        self._waiting += self._engine.compress(data.data)
        # Parts are collected, so that a file gets few large writes.
        if len(self._waiting) > PIECE:
            self._put_away()

    def end(self) -> LazyArray:
        self._waiting += self._engine.flush()
        self._put_away()
        return concatenate(self._kept)

    def _put_away(self) -> None:
        self._kept.append(self._keep(bytes(self._waiting)))
        self._waiting.clear()


@final
class _Inflate:
    """Inflates a stream a part at a time, so that neither the stream nor the result has to fit into memory."""

    def __init__(self, stream: LazyArray) -> None:
        self._engine, self._stream, self._at, self._rest = zlib.decompressobj(), stream, 0, b""

    def some(self, count: int) -> Bytes:
        """At most ``count`` of the next bytes; none only at the end of the stream."""
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
        """Exactly the next ``count`` bytes; raise FormatError if the stream ends before."""
        parts, missing = [], count
        # One call inflates only what the part of the stream in memory holds, which may be less than `count` bytes.
        while missing:
            part = self.some(missing)
            if not part.size:
                raise FormatError("a stream of a patch is too short", fix=_DAMAGED)
            parts.append(part)
            missing -= part.size
        return np.concatenate(parts) if parts else np.empty(0, np.uint8)

    @property
    def ended(self) -> bool:
        """Whether the stream is used up and ends properly."""
        return not self.some(1).size and self._engine.eof


@final
class _Entries:
    """The entries in which W differs from R: their positions in order, and the differences in units."""

    def __init__(self, gaps: _Inflate, near: _Inflate, far: _Inflate, *, itemsize: int) -> None:
        self._gaps, self._near, self._far, self._itemsize = gaps, near, far, itemsize
        self._places, self._units = np.empty(0, np.int64), np.empty(0, f"u{itemsize}")
        self._sum = self._last = self.count = 0

    def before(self, stop: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """The next entries at positions below ``stop``, and their differences in units."""
        # Decoded until an entry lies beyond `stop`, or the stream ends.
        while (not self._places.size or self._places[-1] < stop) and self._decode():
            pass
        end = int(np.searchsorted(self._places, stop))
        entries = self._places[:end], self._units[:end]
        self._places, self._units = self._places[end:], self._units[end:]
        return entries

    def _decode(self) -> bool:
        """Decode some more entries; False if the streams are used up. A gap of 255 or more takes several bytes."""
        # A byte of a gap becomes an int64 place and a unit, about 16 bytes.
        data = self._gaps.some(PIECE >> 4)
        if not data.size:
            return False
        # 255 is not the end of a gap but its continuation.
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
        """Whether all entries were returned and the streams end properly."""
        # A stream that was cut off within a gap would otherwise look complete.
        if self._last == 255:
            raise FormatError("the last gap of a patch is cut off", fix=_DAMAGED)
        return not self._places.size and all(stream.ended for stream in (self._gaps, self._near, self._far))


def _to_ordinals(b: NDArray[Any]) -> NDArray[Any]:
    """Map bit patterns of floats to ordinals: neighbouring floats get neighbouring integers, −0 just below 0."""
    # The sign bit. Negative floats grow in magnitude with their bits, so their order is reversed.
    top = b.dtype.type(1 << (8 * b.dtype.itemsize - 1))
    return np.where(b & top, ~b, b | top)


def _from_ordinals(o: NDArray[Any]) -> NDArray[Any]:
    """Map ordinals back to bit patterns, the inverse of `_to_ordinals`."""
    top = o.dtype.type(1 << (8 * o.dtype.itemsize - 1))
    return np.where(o & top, o & ~top, ~o)


def _encode_gaps(gaps: NDArray[np.int64]) -> Bytes:
    """Encode gaps as bytes: a byte of 255 adds 255 and means that the gap continues in the next byte."""
    wide = np.flatnonzero(gaps >= 255)
    whole, rest = np.divmod(gaps[wide], 255)  # of these alone, as divisions take long
    out = np.full(gaps.size + int(whole.sum()), 255, np.uint8)
    ends = np.arange(gaps.size)
    # Every gap ends as many bytes later as the gaps up to it are continued.
    longer = np.zeros_like(gaps)
    longer[wide] = whole
    ends += np.cumsum(longer)
    last = gaps.astype(np.uint8)
    last[wide] = rest
    out[ends] = last
    return out
