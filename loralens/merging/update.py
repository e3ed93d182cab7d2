"""The update D: the float32 matrix that merging adds and unmerging subtracts, computed a block of rows at a time.

For a pair of factors D is an `ExactProduct`. Updates of other forms (LoKr, LoHa, full differences) are computed from
exact parts by entrywise arithmetic, which also gives the same bits on every machine. All forms have a ``shape``, a
transpose ``T`` with the same bits, and ``rows``, which computes a range of rows in float32, in ``out`` if it is given.
The bits of a row do not depend on the range.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.structured import Dense, Kronecker, Structured, Update
from loralens.errors import ShapeError
from loralens.linalg.device import Device
from loralens.linalg.exact import DeviceProduct, ExactProduct, Singles, exact_product, product_on
from loralens.linalg.factor import Floats, require_finite

BLOCK = 1 << 18  # numbers in a block of rows: 1 MiB in float32 stays in the cache of a core
Weighted = tuple[float, Update]  # the weight of an adapter, and its update


def update_matrix(terms: Sequence[Weighted], *, slices: int, device: Device | None = None) -> "UpdateMatrix":
    """D = Σ w·ΔW of several adapters on one module, in the orientation (out, in).

    Parameters
    ----------
    terms : sequence of (float, LowRank or Structured)
        Weights and updates, all of one shape. The order matters only for updates that are not pairs.
    slices : 1 or 2
        1 for weights stored in 16 or 8 bits, 2 for float32 (see `exact_product`).
    device : Device or None
        The device that multiplies factors; NumPy if None. The bits are the same.

    Raises
    ------
    ShapeError
        The updates differ in shape.
    FormatError
        A factor holds NaN or Inf.
    """
    shapes = {update.shape for _, update in terms}
    if len(shapes) != 1:
        raise ShapeError(
            f"the updates have the shapes {sorted(shapes)}", fix="combine only adapters of the same base model"
        )
    pairs = [(weight * one.scale, one.B, one.A) for weight, one in terms if isinstance(one, LowRank)]
    parts: list[UpdateMatrix] = [product_on(device, exact_product(pairs, slices=slices))] if pairs else []
    parts += [_structured_matrix(weight, one, slices, device) for weight, one in terms if isinstance(one, Structured)]
    # Pairs of all adapters form one exact product, so in the usual case there is nothing left to add.
    return parts[0] if len(parts) == 1 else EntrywiseUpdate(tuple(parts), _sum)


@final
@dataclass(frozen=True, slots=True)
class EntrywiseUpdate:
    """A matrix whose entries are computed from the same entries of its parts, in float64, and rounded once to float32.

    Attributes
    ----------
    parts : tuple of UpdateMatrix
        Matrices of one shape.
    combine : callable
        Takes some rows of every part, float32, and returns these rows of the result.
    """

    parts: "tuple[UpdateMatrix, ...]"
    combine: Callable[..., Floats]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of every part."""
        return self.parts[0].shape

    @property
    def T(self) -> "EntrywiseUpdate":
        """The transpose."""
        return EntrywiseUpdate(tuple(part.T for part in self.parts), self.combine)

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Some rows."""
        return _round_into(self.combine(*(part.rows(start, stop) for part in self.parts)), out)


def _sum(first: Singles, *further: Singles) -> Floats:
    # In a fixed order, since float64 addition of several terms is not associative.
    return first + sum((rows.astype(np.float64) for rows in further), start=np.float64(0))


def _product(first: Singles, second: Singles) -> Floats:
    # The product of two float32 numbers is exact in float64.
    return first.astype(np.float64) * second


@final
@dataclass(frozen=True, slots=True)
class KroneckerUpdate:
    """The Kronecker product: row i is the outer product of row i // b of ``first`` and row i % b of ``second``."""

    first: "UpdateMatrix"
    second: "UpdateMatrix"

    @property
    def shape(self) -> tuple[int, int]:
        """The products of the numbers of rows and of columns."""
        (a, c), (b, d) = self.first.shape, self.second.shape
        return a * b, c * d

    @property
    def T(self) -> "KroneckerUpdate":
        """The transpose."""
        return KroneckerUpdate(self.first.T, self.second.T)

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Some rows."""
        height = self.second.shape[0]
        # The rows of the first factor that these rows of the product need.
        first, last = start // height, -(-stop // height)
        first_rows = self.first.rows(first, last).astype(np.float64)
        # The second factor is read whole: it is small, and a block with at least as many rows needs all of it.
        second_rows = self.second.rows(0, height)
        indices = np.arange(start, stop)
        products = first_rows[indices // height - first, :, None] * second_rows[indices % height, None, :]
        return _round_into(products.reshape(stop - start, -1), out)


@final
@dataclass(frozen=True, slots=True)
class DenseUpdate:
    """A full float32 matrix, in memory or in its file, from which rows are then read on demand."""

    tensor: LazyArray

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the tensor."""
        rows, columns = self.tensor.shape
        return rows, columns

    @property
    def T(self) -> "DenseUpdate":
        """The transpose, in memory, because its rows lie scattered in a file."""
        return DenseUpdate(LazyArray.of(self.tensor.read().T))

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Some rows."""
        return _round_into(self.tensor.rows(start, stop).read(), out)


UpdateMatrix = ExactProduct | DeviceProduct | EntrywiseUpdate | KroneckerUpdate | DenseUpdate


def _dense_matrix(stored: LazyArray, *, in_memory: bool) -> DenseUpdate:
    """A full matrix, rounded to float32. Raises FormatError where it holds NaN or Inf."""

    def rows(start: int, stop: int) -> Singles:
        return require_finite(stored.rows(start, stop).read().astype(np.float32))

    matrix = LazyArray(lambda: rows(0, stored.shape[0]), shape=stored.shape, dtype=np.float32, rows=rows)
    return DenseUpdate(LazyArray.of(matrix.read()) if in_memory else matrix)


def _structured_matrix(weight: float, update: Structured, slices: int, device: Device | None) -> UpdateMatrix:
    """The matrix of an update that is not a pair, built from its parts."""
    form, factor = update.form, weight * update.scale
    part: UpdateMatrix
    if isinstance(form, Dense):
        matrix = form.array.reshape(*form.shape)
        # A full difference is as large as the weight: it stays in its file for the merge, if single rows can be read.
        part = _dense_matrix(matrix, in_memory=not matrix.streams)
    else:
        first, second = (_factor_matrix(side, slices, device) for side in (form.first, form.second))
        product = isinstance(form, Kronecker)
        part = KroneckerUpdate(first, second) if product else EntrywiseUpdate((first, second), _product)
    return EntrywiseUpdate((part,), lambda rows: factor * rows.astype(np.float64))


def _factor_matrix(part: LowRank | Dense, slices: int, device: Device | None) -> UpdateMatrix:
    """The matrix of a factor of a Kronecker or Hadamard product; the factor may be a product itself."""
    if isinstance(part, LowRank):
        return product_on(device, exact_product([(part.scale, part.B, part.A)], slices=slices))
    return _dense_matrix(part.array.reshape(*part.shape), in_memory=True)


def _round_into(rows: Floats | Singles, out: Singles | None) -> Singles:
    # Numbers beyond float32 become ±inf here; the merge counts them as overflowed.
    with np.errstate(over="ignore"):
        if out is None:
            return rows.astype(np.float32)
        np.copyto(out, rows, casting="same_kind")
    return out


def row_ranges(rows: int, columns: int, numbers: int = BLOCK) -> list[tuple[int, int]]:
    """Start and stop of blocks of rows with at most ``numbers`` numbers each, but at least one row."""
    step = max(1, numbers // max(1, columns))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]
