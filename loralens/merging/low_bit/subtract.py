"""Unmerging codes without a patch: the moves are drawn again, and every code goes back to where it came from.

A draw moves a code by the same steps whenever seed, name and update are the same, so the code before it is known unless
several codes end at the same one (`origins.py`). Such entries are counted.
"""

from collections.abc import Iterator

from loralens.core.weights import Codes
from loralens.errors import MismatchError
from loralens.merging.low_bit.apply import CodesMerge
from loralens.merging.low_bit.origins import blocks_of_origins
from loralens.merging.undo.subtract import Doubt


def subtract_codes(merge: CodesMerge, doubt: Doubt) -> Iterator[tuple[int, Codes]]:
    """Yield the first row and the codes of every block of the base; ``doubt`` counts uncertain entries.

    Of several codes, the nearest one is taken.

    Parameters
    ----------
    merge : CodesMerge
        Prepared with the merged weight in place of that of the base, and with the seed of the merge.
    doubt : Doubt

    Raises
    ------
    MismatchError
        The merge scaled the weight (DoRA), or its codes were not drawn.
    """
    if merge.slab_factors or merge.mode != "stochastic":
        raise MismatchError(
            "the codes before this merge cannot be computed again", fix="unmerge with --undo, or take the base"
        )
    for start, codes, origins in blocks_of_origins(merge):
        if origins is None:
            yield start, codes
            continue
        doubt.entries += codes.size
        doubt.several += origins.several
        doubt.none += origins.none
        yield start, origins.nearest
