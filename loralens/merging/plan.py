"""The plan of a merge: which stored tensors of the base change, and how. No number is read to make it.

Every stored tensor is treated as a matrix (rows, columns). The experts of a stack lie one below the other, the kernel
of a convolution is flattened, and a vector is one row. The updates are `Slab`s; each is added to a range of rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, final

import numpy as np

from loralens.core.lazy import LazyArray
from loralens.core.matching import Match, Shape
from loralens.errors import place
from loralens.linalg.device import Device
from loralens.merging.update import UpdateMatrix, Weighted, update_matrix

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
class Slab:
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
    """The changes of one stored tensor: it is replaced, then slabs are added, then rows of tokens are replaced.

    Attributes
    ----------
    key : str
        The key in the base checkpoint, or in the merged one for a new tensor.
    base : LazyArray or None
        The stored tensor; None if the base has no such tensor.
    matrix : tuple of int
        Number of rows and columns of the merged tensor as a matrix.
    slabs : tuple of Slab
        In the order of their rows, without overlap.
    replacement : LazyArray or None
        A tensor trained in full, which may have another shape. If the base stores the weight as codes of a few bits and
        the merged model stores floats, it is the decoded weight, and ``base`` is None.
    scale : LazyArray or None
        The scales of a float8 weight: a float32 factor for each stored number, in the shape of the tensor.
    """

    key: str
    base: LazyArray | None
    matrix: tuple[int, int]
    slabs: tuple[Slab, ...] = ()
    replacement: LazyArray | None = None
    tokens: Tokens | None = None
    scale: LazyArray | None = None

    @property
    def source(self) -> LazyArray:
        """The tensor to which the slabs are added: the replacement, or else that of the base."""
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
