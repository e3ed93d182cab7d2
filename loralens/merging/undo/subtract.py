"""Unmerging without a patch: the update is subtracted, and the entries that this leaves uncertain are counted."""

from dataclasses import dataclass
from typing import final

import numpy as np

from loralens.core.lazy import Array
from loralens.linalg.rounding import largest_number
from loralens.merging.apply import MergedBlock
from loralens.merging.rounding import merge_entries, subtract_update


@final
@dataclass(slots=True)
class Doubt:
    """Counts of the entries of a merged model whose original weight is uncertain.

    Attributes
    ----------
    several : int
        Entries to which at least two weights are rounded. It is unknown which of them was the original.
    none : int
        Entries to which no weight is rounded. The model was not made by this merge, or has been changed since.
    """

    entries: int = 0
    several: int = 0
    none: int = 0


def subtract_block(block: MergedBlock, doubt: Doubt) -> Array:
    """R = round(W' − D) of a block in which ``block.W`` is the merged weight; ``doubt`` counts uncertain entries.

    The update must have no factors of DoRA, because they cannot be computed without the base.
    """
    merged, D = block.W, block.D
    if D is None:
        return merged
    R = subtract_update(merged, D, merged.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        # Which of R and its two neighbours a merge would round to the given number.
        hits = (merge_entries(R, D, merged.dtype) == merged).astype(np.int8)
        # The next numbers towards ±infinity, or towards the largest number for float8, whose types may lack infinity.
        limit = np.asarray(np.inf if R.dtype.itemsize > 1 else largest_number(R.dtype), dtype=R.dtype)
        for other in (np.nextafter(R, limit), np.nextafter(R, -limit)):
            # The limit has no further neighbour: there, `nextafter` returns the limit itself.
            hits += (other != R) & (merge_entries(other, D, merged.dtype) == merged)
    doubt.entries += R.size
    doubt.several += int(np.count_nonzero(hits > 1))
    doubt.none += int(np.count_nonzero(hits == 0))
    return R
