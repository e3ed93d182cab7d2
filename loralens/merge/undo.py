"""Unmerging: the base back from a merged tensor, bit for bit, and proof that it is the base."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.errors import MismatchError
from loralens.linalg.device import Device
from loralens.merge.gain import Gain
from loralens.merge.matrix import Buffer, MatrixRows, cuts
from loralens.merge.patch import Blob, PatchReader
from loralens.merge.plan import Slab, TensorPlan, as_matrix
from loralens.merge.record import Against
from loralens.merge.rounding import removed, rounded, slices_for


@final
@dataclass(frozen=True, slots=True)
class TensorUndo:
    """All that gives one tensor of the base back from the merged one.

    Attributes
    ----------
    key : str
    dtype : dtype
        Of the base.
    shape, matrix : tuple of int
        Of the base tensor, and its rows and columns.
    slabs : tuple of Slab
        Whose terms hold the factors that were merged.
    gains : dict of int to Gain
    patch : Blob
    against : str
    base_hash, merged_hash : str
        SHA-256 of the bytes.
    """

    key: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    slabs: tuple[Slab, ...]
    gains: dict[int, Gain]
    patch: Blob
    against: Against
    base_hash: str
    merged_hash: str

    def zeros(self, start: int, stop: int) -> Array:
        """Rows of nothing, in the dtype of the base."""
        return np.zeros((stop - start, *self.shape[1:]), self.dtype)


def restored(undo: TensorUndo, merged: LazyArray, *, device: Device | None = None) -> Iterator[Array]:
    """The rows of the base tensor in order.

    Parameters
    ----------
    undo : TensorUndo
    merged : LazyArray
        The tensor as it stands in the merged model.
    device : Device or None
        Where the products of the update are made.

    Raises
    ------
    MismatchError
        The tensor is not the one that was merged, which is seen before the first row is given; or what comes out is not
        the base, which is seen after the last.
    FormatError
        The patch is damaged.
    """
    _check_merged(undo, merged)
    reader, digest = PatchReader(undo.patch, undo.dtype.itemsize), sha256()
    for rows in _subtracted(undo, merged, device):
        W = reader.block(rows)
        digest.update(np.ascontiguousarray(W).reshape(-1).view(np.uint8).data)
        yield W
    reader.finish()
    if digest.hexdigest() != undo.base_hash:
        raise MismatchError(
            "what came out is not the base that was merged",
            fix="the undo file is damaged: use another copy",
        )


def _check_merged(undo: TensorUndo, merged: LazyArray) -> None:
    digest = sha256()
    matrix = undo.matrix if merged.shape == undo.shape else as_matrix(merged.shape)
    for rows in MatrixRows(merged, matrix).blocks():
        digest.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
    if digest.hexdigest() != undo.merged_hash:
        raise MismatchError(
            "is not as it was merged: it was changed since, or belongs to another merge",
            fix="give the model that this undo file was written for; adapters merged later are unmerged first",
        )


def _subtracted(undo: TensorUndo, merged: LazyArray, device: Device | None) -> Iterator[Array]:
    """R: the merged rows with the update taken away, in the dtype of the base."""
    if undo.against == "nothing":
        blank = LazyArray(lambda: np.zeros(undo.shape, undo.dtype), shape=undo.shape, dtype=undo.dtype, rows=undo.zeros)
        yield from MatrixRows(blank, undo.matrix).blocks()
        return
    plan = TensorPlan(undo.key, merged, undo.matrix, undo.slabs)
    source, buffers = MatrixRows(merged, undo.matrix), (Buffer(), Buffer())
    products = {slab.start: slab.update(slices_for(undo.dtype), device) for slab in undo.slabs}
    for start, stop, slab in cuts(plan):
        rows = source.rows(start, stop)
        if slab is None or undo.against == "merged":
            yield rounded(rows, undo.dtype)
            continue
        first, last = start - slab.start, stop - slab.start
        D = products[slab.start].rows(first, last, out=buffers[0].of(rows.shape))
        gain = undo.gains.get(slab.start)
        found = gain.of(first, last) if gain else None
        yield removed(rows, D, undo.dtype, gain=found, out=buffers[1].of(rows.shape))
