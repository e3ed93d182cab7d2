"""Unmerging with a patch of codes, which restores the stored tensor of the base; its SHA-256 proves it."""

from collections.abc import Iterator
from hashlib import sha256

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.core.weights import CodedWeight, Codes
from loralens.errors import FormatError, MismatchError
from loralens.merging.low_bit.record import codes_as_bytes, hashed_rows
from loralens.merging.undo.patch import PatchReader
from loralens.merging.undo.restore import TensorUndo, check_merged, check_restored
from loralens.merging.update import row_ranges

ANOTHER = "give the model that this undo file was written for"


def restore_codes(
    undo: TensorUndo,
    weight: CodedWeight | None,
    stored: LazyArray,
    *,
    ordered: bool = False,
) -> Iterator[Array]:
    """Yield the bytes of the rows of the base in order.

    Parameters
    ----------
    undo : TensorUndo
    weight : CodedWeight or None
        The coded weight of the merged model; None if it has no such weight.
    stored : LazyArray
        The stored tensor of the merged model.
    ordered : bool
        Whether rows are yielded in the order of the weight. The writer then brings them into the order of the file.

    Raises
    ------
    MismatchError
        The tensor is not the one that was merged, which is checked before the first row; or the result is not the
        base, which is checked after the last row.
    FormatError
        The patch is damaged.
    """
    check_merged(undo, stored)
    # The hash covers neither the scales nor what the configuration says about the layout.
    if weight is None or weight.grid is None or weight.encode is None or weight.shape != undo.matrix:
        raise MismatchError("is not stored as codes that a merge could have moved", fix=ANOTHER)
    digest = sha256()
    yield from hashed_rows(weight, _restore_blocks(undo, weight), digest, ordered=ordered)
    check_restored(undo, digest.hexdigest())


def _restore_blocks(undo: TensorUndo, weight: CodedWeight) -> Iterator[tuple[int, Codes]]:
    assert weight.grid is not None
    reader = PatchReader(undo.patch, 1)
    for start, stop in row_ranges(*undo.matrix):
        grid = weight.grid(start, stop)
        restored = reader.block(codes_as_bytes(grid.codes, grid.lowest)).reshape(grid.codes.shape)
        codes = restored.astype(np.int16) + np.int16(grid.lowest)
        # Encoders do not check the range of the codes that they pack.
        if codes.max(initial=grid.lowest) > grid.highest:
            raise FormatError(
                "a patch gives codes that the grid does not have", fix="use another copy of the undo file"
            )
        yield start, codes
    # Entries of the patch that are left over belong to another tensor.
    reader.finish()
