"""Unmerging without a patch: what taking the update away gives, and how sure that is."""

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import DTypeLike

from loralens.core.lazy import Array
from loralens.linalg.exact import Singles
from loralens.merge.apply import Block
from loralens.merge.rounding import added, removed


@final
@dataclass(slots=True)
class Doubt:
    """How many entries of a merged model leave open what they were.

    Attributes
    ----------
    entries : int
    several : int
        Entries that at least two weights are rounded to: which of them it was, nothing says.
    none : int
        Entries that no weight is rounded to: the model was not made by this merge, or changed since.
    """

    entries: int = 0
    several: int = 0
    none: int = 0


def subtracted(block: Block, doubt: Doubt) -> Array:
    """R = round(W' − D) of rows in which ``block.W`` is the merged weight, its doubts counted."""
    if block.D is None:
        return block.W
    return _subtracted(block.W, block.D, block.W.dtype, doubt)


def _subtracted(merged: Array, D: Singles, dtype: DTypeLike, doubt: Doubt) -> Array:
    R = removed(merged, D, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        hits = np.zeros(R.shape, np.int8)
        limit = np.asarray(np.inf, dtype=R.dtype) if R.dtype.itemsize > 1 else np.asarray(448.0, dtype=R.dtype)
        for candidate in (R, np.nextafter(R, limit), np.nextafter(R, -limit)):
            hits += added(candidate, D, dtype) == merged
    doubt.entries += R.size
    doubt.several += int(np.count_nonzero(hits > 1))
    doubt.none += int(np.count_nonzero(hits == 0))
    return R
