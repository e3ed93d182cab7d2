"""D, the update by definition: the one float32 matrix that merging adds and unmerging takes away, made row by row.

Of a pair it is `ExactProduct`. Products that are kept in their own form (LoKr, LoHa, full differences) are made from
exact parts by entrywise arithmetic alone, which is the same everywhere too.
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
from loralens.linalg.factor import Floats, finite

BLOCK = 1 << 18  # numbers worked on at a time: 1 MiB in float32 stays in the cache of a core
Weighted = tuple[float, Update]  # how strongly, and what


class Rows(Protocol):
    """A float32 matrix that is made some rows at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @property
    def T(self) -> "Rows":
        """The transpose, with the same bits."""

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Rows ``start`` to ``stop``, float32, into ``out`` where one is given; they do not depend on the cut."""


def update_rows(terms: Sequence[Weighted], *, slices: int, device: Device | None = None) -> Rows:
    """D = Σ w·ΔW of several adapters on one module, in the orientation (out, in).

    Parameters
    ----------
    terms : sequence of (float, LowRank or Structured)
        Weights and updates, all of one shape; the order counts only for what is not a pair.
    slices : 1 or 2
        1 for weights stored in 16 or 8 bits, 2 for float32 (see `exact_product`).
    device : Device or None
        Where products of factors are multiplied; by NumPy where None. The bits are the same.

    Raises
    ------
    ShapeError, FormatError
        Updates of different shapes; NaN or Inf in a factor.
    """
    shapes = {update.shape for _, update in terms}
    if len(shapes) != 1:
        raise ShapeError(f"updates of shapes {sorted(shapes)}", fix="combine only adapters of one base model")
    pairs = [(weight * one.scale, one.B, one.A) for weight, one in terms if isinstance(one, LowRank)]
    parts: list[Rows] = [product_on(device, exact_product(pairs, slices=slices))] if pairs else []
    parts += [_structured(weight, one, slices, device) for weight, one in terms if isinstance(one, Structured)]
    return parts[0] if len(parts) == 1 else Sum(tuple(parts))


@final
@dataclass(frozen=True, slots=True)
class Sum:
    """Several matrices added in float64, the first to the sum of the others, and rounded once to float32."""

    parts: tuple[Rows, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Of every part."""
        return self.parts[0].shape

    @property
    def T(self) -> "Sum":
        """The sum of the transposes."""
        return Sum(tuple(part.T for part in self.parts))

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Some rows."""
        total = sum((part.rows(start, stop).astype(np.float64) for part in self.parts[1:]), start=np.float64(0))
        return _rounded(self.parts[0].rows(start, stop) + total, out)


@final
@dataclass(frozen=True, slots=True)
class Scaled:
    """factor · part, multiplied in float64 and rounded once to float32."""

    factor: float
    part: Rows

    @property
    def shape(self) -> tuple[int, int]:
        """Of the part."""
        return self.part.shape

    @property
    def T(self) -> "Scaled":
        """The transpose."""
        return Scaled(self.factor, self.part.T)

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Some rows."""
        return _rounded(self.factor * self.part.rows(start, stop).astype(np.float64), out)


@final
@dataclass(frozen=True, slots=True)
class Entrywise:
    """first ∘ second: the product of two float32 numbers is exact in float64."""

    first: Rows
    second: Rows

    @property
    def shape(self) -> tuple[int, int]:
        """Of both."""
        return self.first.shape

    @property
    def T(self) -> "Entrywise":
        """The transpose."""
        return Entrywise(self.first.T, self.second.T)

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Some rows."""
        one, two = self.first.rows(start, stop), self.second.rows(start, stop)
        return _rounded(one.astype(np.float64) * two, out)


@final
@dataclass(frozen=True, slots=True)
class Blocks:
    """kron(first, second): row i is the outer product of row i // b of the first with row i % b of the second."""

    first: Rows
    second: Rows

    @property
    def shape(self) -> tuple[int, int]:
        """Products of both."""
        (a, c), (b, d) = self.first.shape, self.second.shape
        return a * b, c * d

    @property
    def T(self) -> "Blocks":
        """The transpose."""
        return Blocks(self.first.T, self.second.T)

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Some rows."""
        height = self.second.shape[0]
        first, last = start // height, -(-stop // height)
        one = self.first.rows(first, last).astype(np.float64)
        two = self.second.rows(0, height)
        which = np.arange(start, stop)
        made = one[which // height - first, :, None] * two[which % height, None, :]
        return _rounded(made.reshape(stop - start, -1), out)


@final
@dataclass(frozen=True, slots=True)
class Given:
    """A matrix that a file holds in full, rounded to float32."""

    array: Singles

    @property
    def shape(self) -> tuple[int, int]:
        """Of the array."""
        rows, columns = self.array.shape
        return rows, columns

    @property
    def T(self) -> "Given":
        """The transpose."""
        return Given(self.array.T)

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Some rows."""
        return _rounded(self.array[start:stop], out)


@final
@dataclass(frozen=True, slots=True)
class Stored:
    """A matrix that stays in its file: its rows are read, and rounded to float32, when they are asked for."""

    tensor: LazyArray

    @property
    def shape(self) -> tuple[int, int]:
        """Of the tensor."""
        rows, columns = self.tensor.shape
        return rows, columns

    @property
    def T(self) -> Given:
        """The transpose, read now: its rows lie scattered in the file."""
        return _given(self.tensor).T

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Some rows."""
        return _rounded(finite(self.tensor.rows(start, stop).read().astype(np.float32)), out)


def _structured(weight: float, update: Structured, slices: int, device: Device | None) -> Rows:
    """One update that is no pair, made of its parts."""
    form = update.form
    if isinstance(form, Kronecker):
        part: Rows = Blocks(_part(form.first, slices, device), _part(form.second, slices, device))
    elif isinstance(form, Hadamard):
        part = Entrywise(_part(form.first, slices, device), _part(form.second, slices, device))
    else:
        assert isinstance(form, Dense)
        part = _difference(form)
    return Scaled(weight * update.scale, part)


def _difference(part: Dense) -> Rows:
    """A matrix given in full: left in its file where its rows can be read alone."""
    matrix = part.array.reshape(*part.shape)
    return Stored(matrix) if matrix.streams else _given(matrix)


def _given(matrix: LazyArray) -> Given:
    return Given(finite(matrix.read().astype(np.float32)))


def _part(part: LowRank | Dense, slices: int, device: Device | None) -> Rows:
    """A factor of a Kronecker or Hadamard product, which may be a product itself."""
    if isinstance(part, LowRank):
        return product_on(device, exact_product([(part.scale, part.B, part.A)], slices=slices))
    return _given(part.array.reshape(*part.shape))


def _rounded(rows: Floats | Singles, out: Singles | None) -> Singles:
    with np.errstate(over="ignore"):
        if out is None:
            return rows.astype(np.float32)
        np.copyto(out, rows, casting="same_kind")
    return out


def row_blocks(rows: int, columns: int, numbers: int = BLOCK) -> list[tuple[int, int]]:
    """Start and stop of blocks of at most about ``numbers`` numbers, one row at least."""
    step = max(1, numbers // max(1, columns))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]
