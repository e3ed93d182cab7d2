"""The update D: the float32 matrix that merging adds and unmerging subtracts, computed a block of rows at a time.

For a pair of factors D is an `ExactProduct`. Updates of other forms (LoKr, LoHa, full differences) are computed from
exact parts by entrywise arithmetic, which also gives the same bits on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np

from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.structured import Dense, Hadamard, Kronecker, Structured, Update
from loralens.errors import ShapeError
from loralens.linalg.device import Device
from loralens.linalg.exact import Singles, exact_product
from loralens.linalg.exact_device import product_on
from loralens.linalg.factor import Floats, require_finite

BLOCK = 1 << 18  # numbers in a block of rows: 1 MiB in float32 stays in the cache of a core
Weighted = tuple[float, Update]  # the weight of an adapter, and its update


class UpdateMatrix(Protocol):
    """A float32 matrix that is computed a block of rows at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @property
    def T(self) -> "UpdateMatrix":
        """The transpose, with the same bits."""

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Rows ``start`` to ``stop``, float32, in ``out`` if it is given; their bits do not depend on the range."""


def update_matrix(terms: Sequence[Weighted], *, slices: int, device: Device | None = None) -> UpdateMatrix:
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
    return parts[0] if len(parts) == 1 else UpdateSum(tuple(parts))


@final
@dataclass(frozen=True, slots=True)
class UpdateSum:
    """A sum of matrices. The first is added in float64 to the sum of the others, then rounded once to float32."""

    parts: tuple[UpdateMatrix, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of every part."""
        return self.parts[0].shape

    @property
    def T(self) -> "UpdateSum":
        """The sum of the transposes."""
        return UpdateSum(tuple(part.T for part in self.parts))

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Some rows."""
        # In a fixed order, since float64 addition of several terms is not associative.
        total = sum((part.rows(start, stop).astype(np.float64) for part in self.parts[1:]), start=np.float64(0))
        return _round_into(self.parts[0].rows(start, stop) + total, out)


@final
@dataclass(frozen=True, slots=True)
class ScaledUpdate:
    """The matrix factor · part, multiplied in float64 and rounded once to float32."""

    factor: float
    part: UpdateMatrix

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the part."""
        return self.part.shape

    @property
    def T(self) -> "ScaledUpdate":
        """The transpose."""
        return ScaledUpdate(self.factor, self.part.T)

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Some rows."""
        return _round_into(self.factor * self.part.rows(start, stop).astype(np.float64), out)


@final
@dataclass(frozen=True, slots=True)
class HadamardUpdate:
    """The entrywise product first ∘ second. The product of two float32 numbers is exact in float64."""

    first: UpdateMatrix
    second: UpdateMatrix

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of both factors."""
        return self.first.shape

    @property
    def T(self) -> "HadamardUpdate":
        """The transpose."""
        return HadamardUpdate(self.first.T, self.second.T)

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Some rows."""
        factor, other_factor = self.first.rows(start, stop), self.second.rows(start, stop)
        return _round_into(factor.astype(np.float64) * other_factor, out)


@final
@dataclass(frozen=True, slots=True)
class KroneckerUpdate:
    """The Kronecker product: row i is the outer product of row i // b of ``first`` and row i % b of ``second``."""

    first: UpdateMatrix
    second: UpdateMatrix

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
        second_rows = self.second.rows(0, height)
        indices = np.arange(start, stop)
        products = first_rows[indices // height - first, :, None] * second_rows[indices % height, None, :]
        return _round_into(products.reshape(stop - start, -1), out)


@final
@dataclass(frozen=True, slots=True)
class DenseUpdate:
    """A full matrix in memory, rounded to float32."""

    array: Singles

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the array."""
        rows, columns = self.array.shape
        return rows, columns

    @property
    def T(self) -> "DenseUpdate":
        """The transpose."""
        return DenseUpdate(self.array.T)

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Some rows."""
        return _round_into(self.array[start:stop], out)


@final
@dataclass(frozen=True, slots=True)
class StoredUpdate:
    """A full matrix that stays in its file. Rows are read and rounded to float32 on demand."""

    tensor: LazyArray

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the tensor."""
        rows, columns = self.tensor.shape
        return rows, columns

    @property
    def T(self) -> DenseUpdate:
        """The transpose, in memory, because its rows lie scattered in the file."""
        return _read_dense(self.tensor).T

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Some rows."""
        return _round_into(require_finite(self.tensor.rows(start, stop).read().astype(np.float32)), out)


def _structured_matrix(weight: float, update: Structured, slices: int, device: Device | None) -> UpdateMatrix:
    """The matrix of an update that is not a pair, built from its parts."""
    form = update.form
    if isinstance(form, Kronecker):
        part: UpdateMatrix = KroneckerUpdate(
            _factor_matrix(form.first, slices, device), _factor_matrix(form.second, slices, device)
        )
    elif isinstance(form, Hadamard):
        part = HadamardUpdate(_factor_matrix(form.first, slices, device), _factor_matrix(form.second, slices, device))
    else:
        assert isinstance(form, Dense)
        part = _dense_matrix(form)
    return ScaledUpdate(weight * update.scale, part)


def _dense_matrix(part: Dense) -> UpdateMatrix:
    """The matrix of a full difference; it stays in its file if single rows can be read."""
    matrix = part.array.reshape(*part.shape)
    # A full difference is as large as the weight: it should not stay in memory for the whole merge.
    return StoredUpdate(matrix) if matrix.streams else _read_dense(matrix)


def _read_dense(matrix: LazyArray) -> DenseUpdate:
    return DenseUpdate(require_finite(matrix.read().astype(np.float32)))


def _factor_matrix(part: LowRank | Dense, slices: int, device: Device | None) -> UpdateMatrix:
    """The matrix of a factor of a Kronecker or Hadamard product; the factor may be a product itself."""
    if isinstance(part, LowRank):
        return product_on(device, exact_product([(part.scale, part.B, part.A)], slices=slices))
    return _read_dense(part.array.reshape(*part.shape))


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
