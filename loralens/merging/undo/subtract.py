"""Unmerging without a patch: what taking the update away gives, and how sure that is."""

from dataclasses import dataclass
from typing import final

import numpy as np

from loralens.core.lazy import Array
from loralens.merging.apply import Block
from loralens.merging.rounding import added, largest, removed


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
    """R = round(W' − D) of rows in which ``block.W`` is the merged weight; what is doubtful is counted in ``doubt``.

    Only of updates without DoRA's gain: that is known from the base alone.
    """
    merged, D = block.W, block.D
    if D is None:
        return merged
    R = removed(merged, D, merged.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        hits = (added(R, D, merged.dtype) == merged).astype(np.int8)
        limit = np.asarray(np.inf if R.dtype.itemsize > 1 else largest(R.dtype), dtype=R.dtype)
        for other in (np.nextafter(R, limit), np.nextafter(R, -limit)):  # the largest number is its own neighbour
            hits += (other != R) & (added(other, D, merged.dtype) == merged)
    doubt.entries += R.size
    doubt.several += int(np.count_nonzero(hits > 1))
    doubt.none += int(np.count_nonzero(hits == 0))
    return R
