"""Plan: which stored tensors of a base model a merge changes, and how, before a number is read.

A stored tensor is looked at as one matrix (rows, columns): a stack of experts as its experts one below the other, a
convolution with its kernel flattened, a vector as one row. What is added to it are `Slab`s, each to some of its rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, final

import numpy as np

from loralens.core.lazy import LazyArray
from loralens.core.naming.matching import Match, Shape
from loralens.errors import place
from loralens.linalg.device import Device
from loralens.merging.update import Rows, Weighted, update_rows

Axis = Literal["rows", "columns"]


@final
@dataclass(frozen=True, slots=True)
class Magnitude:
    """DoRA: the lengths to which the vectors of W + ΔW are brought.

    Attributes
    ----------
    lengths : LazyArray or None
        As many numbers as the stored tensor has rows, or columns; one an input channel of a convolution, whose columns
        are those of its kernel, side by side. None: those of the base.
    axis : str
        ``rows``: one length a row of the stored tensor; ``columns``: one a column, or one for the columns of a channel.
    """

    lengths: LazyArray | None
    axis: Axis


@final
@dataclass(frozen=True, slots=True)
class Slab:
    """Rows ``start`` to ``stop`` of a stored tensor, and the update that is added to them.

    Attributes
    ----------
    module : str
        As the adapter calls it.
    terms : tuple of (float, LowRank or Structured)
        The updates and how strongly they count, in the order given.
    transposed : bool
        Whether the tensor is stored (in, out).
    magnitude : Magnitude or None
    """

    module: str
    start: int
    stop: int
    terms: tuple[Weighted, ...]
    transposed: bool = False
    magnitude: Magnitude | None = None

    def update(self, slices: int, device: Device | None = None) -> Rows:
        """D of these rows, as they are stored; its products made on ``device``."""
        with place(self.module):
            rows = update_rows(self.terms, slices=slices, device=device)
        return rows.T if self.transposed else rows


@final
@dataclass(frozen=True, slots=True)
class Tokens:
    """Rows of an embedding that were trained in full, and stand for those of the base: not a difference."""

    indices: tuple[int, ...]
    rows: LazyArray  # (tokens, dim)


@final
@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What happens to one stored tensor: it is replaced, slabs are added, rows of tokens are put in; each where given.

    Attributes
    ----------
    key : str
        In the base checkpoint; for a new tensor, in the merged one.
    base : LazyArray or None
        The stored tensor; None for one that the base has not.
    matrix : tuple of int
        Rows and columns under which the merged tensor is looked at.
    slabs : tuple of Slab
        In the order of their rows, without overlap.
    replacement : LazyArray or None
        A tensor trained in full, which may be of another shape.
    tokens : Tokens or None
    scale : LazyArray or None
        Of float8 weights: what each stored number is multiplied by, float32, of the shape of the tensor.
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
        """What the slabs are added to."""
        tensor = self.base if self.replacement is None else self.replacement
        assert tensor is not None
        return tensor

    @property
    def shape(self) -> Shape:
        """Of the merged tensor."""
        return self.source.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the merged tensor, where nobody asks for another: that of the base."""
        return self.source.dtype if self.base is None else self.base.dtype


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a merge does.

    Attributes
    ----------
    tensors : mapping of str to TensorPlan
        By key; every other tensor of the base is copied.
    matches : tuple of Match
        How the names of each adapter were matched.
    missing : tuple of str
        Modules and tensors left out because the base has no place for them.
    notes : tuple of str
        What else the user should know, a sentence each.
    config : mapping
        Fields of ``config.json`` that change; None: the field goes.
    dropped : tuple of str
        Keys of the base that the merged model lacks.
    """

    tensors: Mapping[str, TensorPlan]
    matches: tuple[Match, ...] = ()
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


def as_matrix(shape: Shape, *, experts: bool = False) -> tuple[int, int]:
    """Rows and columns under which a stored tensor is looked at."""
    if experts:
        return shape[0] * shape[1], prod(shape[2:])
    if len(shape) < 2:
        return 1, prod(shape)
    return shape[0], prod(shape[1:])
