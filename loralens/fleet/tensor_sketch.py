"""The TensorSketch of an update: a vector that is linear in ΔW, with the same bits on every machine.

The count-sketch of B·A adds s(o)·s(i)·ΔW[o, i] into bucket h(o) + h(i) mod 4096. For a pair it is the sum over the rank
of circular convolutions of the count-sketch of a column of B with that of a row of A (Pham & Pagh 2013), which the
Fourier transform computes.

A Fourier transform rounds differently on different processors. Therefore the factors are rounded to integers first.
They are so small that the transform errs by less than a half, and rounding its result to integers gives the exact
convolution. Everything else is a sum of float64 numbers in a fixed order. The first rounding changes a sketch by about
1e-4 of its length, and the rounding to 8 bits that follows by 1e-2.
"""

import threading
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import Array
from loralens.errors import FormatError
from loralens.fleet.sketches import START_WIDTH, WIDTH
from loralens.linalg.rounding import Draws

# The version is part of every key: sketches of two versions must not be compared.
VERSION = "loralens-fleet-1"
# The hashes of small groups of modules are kept, in 3 bytes for each index: at most 36 MiB. A model of 32 blocks with 7
# modules each, of which two are read together, needs 336 of them.
SMALL, CACHED = 16_384, 768  # indices of a small group, and how many hashes are kept

Positions = NDArray[np.intp] | NDArray[np.uint16]
Floats = NDArray[np.float64]


class BucketHash(NamedTuple):
    """A position and a sign for each index, rows of modules; ``most`` indices at most have the same position."""

    positions: NDArray[np.uint16]
    signs: NDArray[np.int8]
    most: int


def bucket_hashes(keys: Sequence[str], side: str, size: int, width: int) -> BucketHash:
    """The hashes of the indices 0 … size−1 of a side of modules into ``width`` buckets, a row for each module.

    Parameters
    ----------
    keys : sequence of str
        The keys of the modules.
    side : str
        ``out``, ``in`` or ``start``.
    size : int
    width : int
        A power of two up to 4096.
    """
    return (_cached_rows if len(keys) * size <= SMALL else _draw_rows)(tuple(keys), side, size, width)


def _draw_rows(keys: tuple[str, ...], side: str, size: int, width: int) -> BucketHash:
    hashes = [_draw(key, side, size, width) for key in keys]
    positions, signs, most = zip(*hashes, strict=True)
    return BucketHash(np.stack(positions), np.stack(signs), max(most))


def _draw(key: str, side: str, size: int, width: int) -> BucketHash:
    assert width <= 4096, width
    text = f"{VERSION}|{key}|{side}|{size}"
    digest = blake2b(text.encode("utf-8", "backslashreplace"), digest_size=16).digest()
    # 12 bits of each number are the position and one is the sign.
    numbers = Draws(int.from_bytes(digest, "little")).words(0, size)
    signs = (1 - 2 * ((numbers >> 12) & 1).astype(np.int8)).astype(np.int8)
    positions = (numbers % width).astype(np.uint16)
    return BucketHash(positions, signs, int(np.bincount(positions).max(initial=0)))


_cached_rows = lru_cache(maxsize=CACHED)(_draw_rows)


class StackedRows(NamedTuple):
    """One factor of several modules of one shape and rank."""

    rows: Floats  # (modules, rank, size)
    grams: Floats  # (modules, rank, rank): their inner products
    peaks: Floats  # (modules, rank): the largest absolute value of each row; NaN if the row holds NaN


def stack(factors: Sequence[Array], scales: Sequence[float] | None) -> StackedRows:
    """The columns of every B, shape (size, rank), times its scale, or without scales the rows of every A, (rank, size).

    All factors have one shape and any float dtypes.
    """
    rank, size = factors[0].shape if scales is None else factors[0].shape[::-1]
    rows = np.empty((len(factors), rank, size))
    for i, factor in enumerate(factors):
        rows[i] = factor if scales is None else factor.T
        if scales is not None:
            rows[i] *= scales[i]
    return StackedRows(rows, np.matmul(rows, np.swapaxes(rows, 1, 2)), peaks_of(rows))


def peaks_of(rows: Array) -> Array:
    """The largest absolute value of every row, over the last axis; NaN if the row holds NaN."""
    return np.asarray(np.abs(rows).max(axis=-1, initial=0))


SIDES = ("out", "in")  # of B and of A
COLUMNS = 32  # convolutions that are added before they are rounded
# An entry of the count-sketch of a column times one of its row is at most 2²⁸, so the sum of 32 convolutions of 4096
# numbers is at most 2⁵·2¹²·2²⁸ = 2⁴⁵. A transform of 4096 numbers errs by at most about 10·2⁻⁵³ of that: 0.04.
BITS = 28  # bits of the product of two entries
# The largest number of a column or row below which the whole counts as 0, as the scale to integers would overflow.
LEAST_PEAK = 2.0**-900
TOGETHER = 16  # columns that are transformed together: with 1 MiB they stay in the cache
LOST = 3  # bits of a module that may be lost if its convolutions are added to those of the modules before it
DENSE_NUMBERS = 1 << 18  # numbers of a full matrix that are added at a time
# The places of the numbers of small groups of modules are kept, 8 bytes for each number of a factor.
SMALL_PLACES, PLACES_CACHED = (
    1 << 15,
    40,
)  # numbers of a small factor, and how many places are kept: at most 10 MiB

Complexes = NDArray[np.complex128]


class _Columns(threading.local):
    """Memory for the columns of a transform, one for each thread; fresh pages for every adapter would take longer."""

    def __init__(self) -> None:
        self.numbers = np.empty((COLUMNS, WIDTH), np.complex128)


_columns = _Columns()


class SketchSide(NamedTuple):
    """One side of modules of one shape and rank, whose rows become count-sketches."""

    numbers: Floats  # (modules, rank, size); each row is multiplied by its factor and rounded before it is added up
    factors: Floats  # (modules, rank)
    signs: Floats  # (modules, size)


@final
class TensorSketch:
    """The sum of the sketches of modules; `total` returns it."""

    def __init__(self) -> None:
        self._total = np.zeros(WIDTH)
        # Transforms of convolutions that are not rounded yet, their number, and the exponent of their scale.
        self._transform, self._count, self._shift = np.zeros(WIDTH, np.complex128), 0, 0

    def add_pair(self, key: str, B: Array, A: Array, scale: float) -> None:
        """Add scale·B·A of the module with this key; some columns at a time are converted to float64."""
        for first in range(0, B.shape[1], COLUMNS):
            columns = slice(first, first + COLUMNS)
            x = np.multiply(B[:, columns].T, scale, dtype=np.float64, order="C")[None]
            y = A[None, columns].astype(np.float64)
            self.add_pairs([key], (x, y), (peaks_of(x), peaks_of(y)))

    def add_pairs(self, keys: Sequence[str], pairs: tuple[Floats, Floats], peaks: tuple[Floats, Floats]) -> None:
        """Add the products of pairs of one shape and rank.

        Parameters
        ----------
        keys : sequence of str
        pairs : two float64 arrays, shapes (modules, rank, out) and (modules, rank, in)
            The columns of scale·B as rows, and the rows of A. There are at most 32 of each in all modules.
        peaks : two float64 arrays, shape (modules, rank)
            The largest absolute value of each row.
        """
        hashes = [bucket_hashes(keys, side, rows.shape[2], WIDTH) for side, rows in zip(SIDES, pairs, strict=True)]
        # Columns and rows with NaN are used too.
        used = ~((peaks[0] < LEAST_PEAK) | (peaks[1] < LEAST_PEAK))
        if not used.any():
            return
        # The exponents of bounds on the entries of the count-sketches.
        bits = [np.frexp(peak * hashed.most)[1].astype(np.int64) for peak, hashed in zip(peaks, hashes, strict=True)]
        shift = self._common_shift(used.size, BITS - int((bits[0] + bits[1])[used].max()))
        x_shifts = (shift + bits[1] - bits[0]) // 2
        sides = [
            # A column of zeros adds nothing, so the row of the other factor must not either.
            SketchSide(
                rows,
                np.ldexp(used.astype(np.float64), shifts.astype(np.int32)),
                hashed.signs.astype(np.float64, copy=False),
            )
            for rows, shifts, hashed in zip(pairs, (x_shifts, shift - x_shifts), hashes, strict=True)
        ]
        self._transform += _sum_of_squares(keys, *sides)
        self._count += used.size

    def _common_shift(self, count: int, shift: int) -> int:
        """The exponent of the scale of the next ``count`` convolutions, for which ``shift`` would be best.

        Convolutions are added before they are rounded, and then need the same scale.
        """
        if self._count and not (self._count + count <= COLUMNS and self._shift <= shift <= self._shift + LOST):
            self._round()
        if not self._count:
            self._shift = shift
        return self._shift

    def _round(self) -> None:
        """Add the sum of convolutions whose transform waits, as exact integers times their scale."""
        if self._count:
            convolution = np.rint(np.fft.ifft(self._transform).imag / 2)
            self._total += np.ldexp(convolution, -self._shift)
            self._transform, self._count = np.zeros(WIDTH, np.complex128), 0

    def add_dense(self, key: str, matrix: Array) -> None:
        """Add a full matrix ΔW, each entry to its bucket."""
        # The order in which modules are added decides the last bits.
        self._round()
        rows, columns = (
            bucket_hashes([key], side, size, WIDTH) for side, size in zip(SIDES, matrix.shape, strict=True)
        )
        step = max(1, DENSE_NUMBERS // max(1, matrix.shape[1]))
        for first in range(0, len(matrix), step):
            part = slice(first, first + step)
            buckets = (rows.positions[0, part, None] + columns.positions) % WIDTH
            weights = matrix[part] * rows.signs[0, part, None] * columns.signs
            self._total += np.bincount(buckets.ravel(), weights.ravel(), WIDTH)

    def total(self) -> Floats:
        """The sketch of all modules, shape (4096,).

        Raises
        ------
        FormatError
            It leaves the range of float64, or a factor holds NaN or Inf.
        """
        self._round()
        if not np.isfinite(self._total).all():
            raise FormatError("ΔW holds NaN or Inf", fix="go back to an earlier checkpoint")
        return self._total


def _sum_of_squares(keys: Sequence[str], B: SketchSide, A: SketchSide) -> Complexes:
    """The sum of the squares of the transforms of z = b + i·a over all rows; it changes the numbers of both sides.

    b and a are the count-sketches of a row of B and of that of A.
    """
    for side in (B, A):
        rows = side.numbers
        rows *= side.factors[..., None]
        np.rint(rows, out=rows)
        rows *= side.signs[:, None]
    step = max(1, TOGETHER // B.numbers.shape[1])
    places = [_places(keys, name, side.numbers.shape[1:], step) for name, side in zip(SIDES, (B, A), strict=True)]
    total = np.zeros(WIDTH, np.complex128)
    for first in range(0, len(keys), step):
        part = slice(first, first + step)
        total += _squares([(places[0][part], B.numbers[part]), (places[1][part], A.numbers[part])])
    return total


def _places(keys: Sequence[str], side: str, shape: tuple[int, ...], together: int) -> Positions:
    """Where the numbers of the rows of one side of modules go in the columns that are transformed together.

    Parameters
    ----------
    keys : sequence of str
    side : str
    shape : (rank, size)
    together : int
        Modules whose columns are transformed together.

    Returns
    -------
    integers, shape (modules, rank, size)
        Places of the real numbers; the imaginary ones follow them.
    """
    rank, size = shape
    find = _small_places if len(keys) * rank * size <= SMALL_PLACES else _all_places
    return find(tuple(keys), side, rank, size, together)


def _all_places(keys: tuple[str, ...], side: str, rank: int, size: int, together: int) -> Positions:
    positions = bucket_hashes(keys, side, size, WIDTH).positions.astype(np.intp)
    columns = np.arange(len(keys) * rank) % (together * rank)
    places: Positions = 2 * (WIDTH * columns.reshape(len(keys), rank, 1) + positions[:, None])
    return places


_small_places = lru_cache(maxsize=PLACES_CACHED)(_all_places)


def _squares(parts: Sequence[tuple[Positions, Floats]]) -> Complexes:
    """The sum of the transforms of z∗z over all columns: z is the count-sketch of a column of B plus i times that of A.

    Its imaginary part is twice the convolution of both, so that one transform does for them.

    Parameters
    ----------
    parts : two pairs of arrays, shape (modules, rank, size)
        The places and the numbers of B, and those of A. The numbers are integers with their signs.
    """
    modules, rank, _ = parts[0][1].shape
    columns = _columns.numbers[: modules * rank]
    columns.fill(0)
    # A complex number is stored as its real part, from B, and its imaginary part, from A.
    numbers = columns.view(np.float64).ravel()
    for part, (places, rows) in enumerate(parts):
        # The sums are integers, so that they are exact in any order.
        np.add.at(numbers[part:], places.ravel(), rows.ravel())
    # NumPy's, since SciPy's is no faster and takes 27 MB to import.
    np.fft.fft(columns, axis=1, out=columns)
    np.square(columns, out=columns)
    # Their sum as a product with ones, which takes half the time.
    total: Complexes = np.dot(np.ones(len(columns)), columns.view(np.float64)).view(np.complex128)
    return total


NUMBERS = 1024  # numbers of A that are used, from its first row on; they are more than enough to tell starts apart
START_BITS = 15  # bits to which they are rounded, so that the sum of their squares is an exact integer
MOST_SHIFT = 1023  # exponent of the largest power of two; an A of numbers below 2⁻¹⁰⁰⁸ is rounded to fewer bits
WAITING = 1 << 14  # numbers that are sketched together, because each step takes longer to call than to do: 128 KiB


@final
class StartSketch:
    """The sum of the count-sketches of the directions of A, which `total` returns; every module counts alike."""

    def __init__(self) -> None:
        self._total: Floats = np.zeros(START_WIDTH)
        # Keys of modules and the first numbers of their A, as they were added.
        self._waiting: list[tuple[Sequence[str], Floats]] = []

    def add(self, keys: Sequence[str], A: Array) -> None:
        """Add the first numbers of the factors A of modules of one shape; A has the shape (modules, rank, in)."""
        numbers = A.reshape(len(keys), -1)[:, :NUMBERS].astype(np.float64)
        waiting = self._waiting
        if waiting and (
            numbers.shape[1] != waiting[0][1].shape[1] or sum(one.size for _, one in waiting) + numbers.size > WAITING
        ):
            self._sketch()
        self._waiting.append((keys, numbers))

    def _sketch(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        numbers = np.concatenate([numbers for _, numbers in waiting])
        largest = np.abs(numbers).max(axis=1, initial=0)
        # Integers, because the length of a vector of floats would depend on the order in which squares are added.
        shifts = np.minimum(START_BITS - np.frexp(largest)[1].astype(np.int32), MOST_SHIFT)
        numbers *= np.ldexp(1.0, shifts)[:, None]
        np.rint(numbers, out=numbers)
        lengths = np.sqrt(np.einsum("mn,mn->m", numbers, numbers))
        # An A of zeros has no direction.
        numbers /= np.where(lengths > 0, lengths, 1)[:, None]
        hashes = [bucket_hashes(keys, "start", numbers.shape[1], START_WIDTH) for keys, _ in waiting]
        numbers *= np.concatenate([hashed.signs for hashed in hashes])
        places = [hashed.positions.astype(np.intp, copy=False) + i * START_WIDTH for i, hashed in enumerate(hashes)]
        # bincount adds in the order of the numbers, so that the bits of the sums do not depend on the machine.
        sums = np.bincount(np.concatenate(places).ravel(), numbers.ravel(), len(waiting) * START_WIDTH)
        for one in sums.reshape(len(waiting), START_WIDTH):
            self._total += one

    def total(self) -> Floats:
        """The start sketch of all modules, shape (256,)."""
        self._sketch()
        return self._total
