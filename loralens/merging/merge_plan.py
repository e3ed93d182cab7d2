"""The plan of a merge: which stored tensors of the base change, and how. No number is read to make it.

Every stored tensor is treated as a matrix (rows, columns). The experts of a stack lie one below the other, the kernel
of a convolution is flattened, and a vector is one row. The updates are `Segment`s; each is added to a range of rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any, Literal, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.matching import Match, Shape
from loralens.core.structured import Dense, Kronecker, Structured, Update
from loralens.errors import place
from loralens.linalg.device import Device
from loralens.linalg.exact import DeviceProduct, ExactProduct, Singles, exact_product, product_on
from loralens.linalg.factor import Floats, aligned, require_finite
from loralens.merging.patch import bits

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
    FormatError
        A factor holds NaN or Inf.
    """
    pairs = [(weight * one.scale, one.B, one.A) for weight, one in terms if isinstance(one, LowRank)]
    parts: list[UpdateMatrix] = [product_on(device, exact_product(pairs, slices=slices))] if pairs else []
    parts += [_structured_matrix(weight, one, slices, device) for weight, one in terms if isinstance(one, Structured)]
    # Added in a fixed order, since float64 addition of several terms is not associative.
    # Pairs of all adapters form one exact product, so in the usual case there is nothing left to add.
    return (
        parts[0]
        if len(parts) == 1
        else EntrywiseUpdate(
            tuple(parts),
            lambda first, *further: first + sum((X.astype(np.float64) for X in further), start=np.float64(0)),
        )
    )


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
    """A full matrix, in memory or in its file, from which rows are then read; NaN and Inf raise a FormatError."""

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
        return _round_into(require_finite(self.tensor.rows(start, stop).read().astype(np.float32)), out)


UpdateMatrix = ExactProduct | DeviceProduct | EntrywiseUpdate | KroneckerUpdate | DenseUpdate


def _dense_matrix(form: Dense, *, in_memory: bool = False) -> DenseUpdate:
    """A full matrix, read into memory unless single rows can be read from its file."""
    matrix = form.array.reshape(*form.shape)
    return DenseUpdate(matrix if matrix.streams and not in_memory else LazyArray.of(matrix.read()))


def _structured_matrix(weight: float, update: Structured, slices: int, device: Device | None) -> UpdateMatrix:
    """The matrix of an update that is not a pair, built from its parts."""
    form, factor = update.form, weight * update.scale
    part: UpdateMatrix
    if isinstance(form, Dense):
        # A full difference is as large as the weight, so it stays in its file for the merge.
        part = _dense_matrix(form)
    else:
        first, second = (
            # A factor may be a product itself.
            product_on(device, exact_product([(side.scale, side.B, side.A)], slices=slices))
            if isinstance(side, LowRank)
            else _dense_matrix(side, in_memory=True)
            for side in (form.first, form.second)
        )
        if isinstance(form, Kronecker):
            part = KroneckerUpdate(first, second)
        else:  # exact in float64
            part = EntrywiseUpdate((first, second), lambda X, Y: X.astype(np.float64) * Y)
    return EntrywiseUpdate((part,), lambda rows: factor * rows.astype(np.float64))


def _round_into(rows: Floats | Singles, out: Singles | None) -> Singles:
    # Numbers beyond float32 become ±inf here; the merge counts them as overflowed.
    with np.errstate(over="ignore"):
        if out is None:
            return rows.astype(np.float32)
        np.copyto(out, rows, casting="same_kind")
    return out


def row_ranges(rows: int, columns: int) -> list[tuple[int, int]]:
    """Start and stop of blocks of rows with at most `BLOCK` numbers each, but at least one row."""
    step = max(1, BLOCK // max(1, columns))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


Axis = Literal["rows", "columns"]


@final
@dataclass(frozen=True, slots=True)
class Magnitude:
    """DoRA's magnitude: the lengths to which the vectors of W + ΔW are scaled.

    Attributes
    ----------
    lengths : LazyArray or None
        One number for each row or each column of the stored tensor, or one for each input channel of a convolution. A
        channel has as many adjacent columns as the kernel has entries. None stands for the lengths of the base.
    axis : str
        ``rows``: there is one length for each row of the stored tensor. ``columns``: there is one for each column, or
        one for the columns of each channel.
    """

    lengths: LazyArray | None
    axis: Axis


@final
@dataclass(frozen=True, slots=True)
class Segment:
    """The update of rows ``start`` to ``stop`` of a stored tensor.

    Attributes
    ----------
    module : str
        The name in the adapter.
    terms : tuple of (float, LowRank or Structured)
        The weights of the adapters and their updates, in the order of the adapters.
    transposed : bool
        Whether the tensor is stored (in, out).
    """

    module: str
    start: int
    stop: int
    terms: tuple[Weighted, ...]
    transposed: bool = False
    magnitude: Magnitude | None = None

    def update(self, slices: int, device: Device | None = None) -> UpdateMatrix:
        """The update D of these rows in the stored orientation; ``device`` multiplies the factors."""
        with place(self.module):
            rows = update_matrix(self.terms, slices=slices, device=device)
        # For a pair this swaps the factors and costs nothing.
        return rows.T if self.transposed else rows


@final
@dataclass(frozen=True, slots=True)
class Tokens:
    """Rows of an embedding that were trained in full. They replace the rows of the base."""

    indices: tuple[int, ...]
    rows: LazyArray  # (tokens, dim)


@final
@dataclass(frozen=True, slots=True)
class TensorPlan:
    """The changes of one stored tensor: it is replaced, then segments are added, then rows of tokens are replaced.

    Attributes
    ----------
    key : str
        The key in the base checkpoint, or in the merged one for a new tensor.
    base : LazyArray or None
        The stored tensor; None if the base has no such tensor.
    matrix : tuple of int
        Number of rows and columns of the merged tensor as a matrix.
    segments : tuple of Segment
        In the order of their rows, without overlap.
    replacement : LazyArray or None
        A tensor trained in full, which may have another shape. If the base stores the weight quantised and
        the merged model stores floats, it is the decoded weight, and ``base`` is None.
    scale : LazyArray or None
        The scales of a float8 weight: a float32 factor for each stored number, in the shape of the tensor.
    """

    key: str
    base: LazyArray | None
    matrix: tuple[int, int]
    segments: tuple[Segment, ...] = ()
    replacement: LazyArray | None = None
    tokens: Tokens | None = None
    scale: LazyArray | None = None

    @property
    def source(self) -> LazyArray:
        """The tensor to which the segments are added: the replacement, or else that of the base."""
        # A pair beside a tensor saved in full was trained on that tensor, not on the base.
        tensor = self.base if self.replacement is None else self.replacement
        assert tensor is not None
        return tensor

    @property
    def shape(self) -> Shape:
        """The shape of the merged tensor."""
        return self.source.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The default dtype of the merged tensor, which is that of the base."""
        return self.source.dtype if self.base is None else self.base.dtype


@final
@dataclass(frozen=True, slots=True)
class MergePlan:
    """All changes that a merge makes to a base model.

    Attributes
    ----------
    tensors : mapping of str to TensorPlan
        Plans by key. Every other tensor of the base is copied.
    matches : tuple of Match
        How the names of each adapter were matched.
    missing : tuple of str
        Modules and tensors of the adapters that are left out because the base has no place for them.
    notes : tuple of str
        Further messages for the user, one sentence each.
    config : mapping
        Fields of ``config.json`` that change. A field whose value is None is removed.
    dropped : tuple of str
        Keys of the base that the merged model does not have.
    """

    tensors: Mapping[str, TensorPlan]
    matches: tuple[Match, ...] = ()
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


def as_matrix(shape: Shape, *, experts: bool = False) -> tuple[int, int]:
    """Number of rows and columns of a stored tensor as a matrix; ``experts`` if it is a stack of them."""
    if experts:
        return shape[0] * shape[1], prod(shape[2:])
    # A vector is one row rather than one column, so that a block of rows can hold all of it.
    if len(shape) < 2:
        return 1, prod(shape)
    return shape[0], prod(shape[1:])


@final
class MatrixRows:
    """The rows of a stored tensor as a matrix.

    If single rows cannot be read, the whole tensor is read once and kept. If it is a stack whose experts can be read
    separately, only the last expert is kept.
    """

    def __init__(self, tensor: LazyArray, matrix: tuple[int, int]) -> None:
        self._matrix = matrix
        flat = tensor.reshape(*matrix)
        # A flattened stack that cannot be read by rows can still be read by experts.
        self._stack = len(tensor.shape) == 3 and matrix[0] != tensor.shape[0] and not flat.streams
        self._tensor = tensor if self._stack else flat
        self._held: tuple[int, Array] | None = None

    def rows(self, start: int, stop: int) -> Array:
        """Rows ``start`` to ``stop`` in the dtype of the file. They lie within one expert, and must not be modified."""
        # The callers' row ranges never cross the end of an expert, so each call needs one expert.
        if self._stack:
            height = self._tensor.shape[1]
            expert = start // height
            if self._held is None or self._held[0] != expert:
                self._held = None  # two experts at a time would need twice the memory
                self._held = expert, self._tensor.rows(expert, expert + 1).read()[0]
            return self._held[1][start - expert * height : stop - expert * height]
        if self._tensor.streams:
            return self._tensor.rows(start, stop).read()
        if self._held is None:
            self._held = 0, self._tensor.read()
        return self._held[1][start:stop]

    def blocks(self) -> Iterator[Array]:
        """Yield all rows in order, a block at a time."""
        # Blocks end with their expert, since `rows` reads from one expert at a time.
        height = self._tensor.shape[1] if self._stack else self._matrix[0]
        for first in range(0, self._matrix[0], max(height, 1)):
            for start, stop in row_ranges(height, self._matrix[1]):
                yield self.rows(first + start, first + stop)


def matrix_blocks(tensor: LazyArray) -> Iterator[Array]:
    """All numbers of a tensor in order, a block of its rows at a time."""
    return MatrixRows(tensor, as_matrix(tensor.shape)).blocks()


def have_same_values(first: LazyArray, second: LazyArray) -> bool:
    """Whether two stored tensors hold the same values; if their dtypes differ, both are cast to the narrower one."""
    if first.shape != second.shape:
        return False
    # A model that was saved in a narrower dtype holds the same values as far as that dtype can.
    narrow = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    with np.errstate(over="ignore", invalid="ignore"):
        return all(
            np.array_equal(bits(one.astype(narrow, copy=False)), bits(two.astype(narrow, copy=False)))
            for one, two in zip(matrix_blocks(first), matrix_blocks(second), strict=True)
        )


def cuts(plan: TensorPlan, *, within: tuple[int, int] | None = None) -> Iterator[tuple[int, int, Segment | None]]:
    """Yield blocks of rows in order, each with its segment or None. No block crosses limits of segments or experts.

    ``within`` limits the rows to those from a first one to before another.
    """
    rows, columns = plan.matrix
    shape = plan.shape
    height = shape[1] if len(shape) == 3 and rows != shape[0] else rows
    # Blocks end at the limits of segments and at those of experts, whichever come first.
    least, most = within or (0, rows)
    edges = sorted({0, rows, *range(0, rows, max(height, 1)), *(e for s in plan.segments for e in (s.start, s.stop))})
    at = {segment.start: segment for segment in plan.segments}
    segment: Segment | None = None
    for start, stop in pairwise(edges):
        # A segment goes on until its stop, even past the end of an expert within it.
        segment = at.get(start, segment if segment and segment.stop > start else None)
        begin, end = max(start, least), min(stop, most)
        for first, last in row_ranges(max(end - begin, 0), columns):
            yield begin + first, begin + last, segment


@final
class Buffer:
    """A float32 array that is reused from block to block, since new memory pages cost more than the arithmetic."""

    def __init__(self) -> None:
        self._array: Singles = np.empty(0, np.float32)

    def of(self, shape: tuple[int, ...]) -> Singles:
        """An array of this shape to write into. It overwrites the array of the previous call."""
        size = int(np.prod(shape))
        # It only grows: the last block of a tensor is the smallest.
        if self._array.size < size:
            self._array = aligned(size, np.float32)
        return self._array[:size].reshape(shape)
