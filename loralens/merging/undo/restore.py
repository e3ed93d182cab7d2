"""Unmerging: the base back from a merged tensor, bit for bit, and proof that it is the base."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.errors import MismatchError
from loralens.linalg.device import Device
from loralens.merging.gain import Gain
from loralens.merging.matrix import Buffer, MatrixRows, cuts
from loralens.merging.plan import Slab, TensorPlan, as_matrix
from loralens.merging.record import Against, feed
from loralens.merging.rounding import removed, rounded, slices_for
from loralens.merging.undo.patch import Blob, PatchReader


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
    for rows in _start(undo, merged, device):
        W = reader.block(rows)
        feed(digest, W)
        yield W
    reader.finish()
    if digest.hexdigest() != undo.base_hash:
        raise MismatchError(
            "what came out is not the base that was merged",
            fix="the undo file is damaged: use another copy",
        )


def _check_merged(undo: TensorUndo, merged: LazyArray) -> None:
    """Refuse a tensor whose bytes are not those that the merge wrote."""
    digest = sha256()
    matrix = undo.matrix if merged.shape == undo.shape else as_matrix(merged.shape)
    for rows in MatrixRows(merged, matrix).blocks():
        feed(digest, rows)
    if digest.hexdigest() != undo.merged_hash:
        raise MismatchError(
            "is not as it was merged: it was changed since, or belongs to another merge",
            fix="give the model that this undo file was written for; adapters merged later are unmerged first",
        )


def _start(undo: TensorUndo, merged: LazyArray, device: Device | None) -> Iterator[Array]:
    """The rows that the patch begins with, in the dtype of the base."""
    if undo.against == "nothing":
        blank = LazyArray(lambda: np.zeros(undo.shape, undo.dtype), shape=undo.shape, dtype=undo.dtype, rows=undo.zeros)
        return MatrixRows(blank, undo.matrix).blocks()
    slabs = undo.slabs if undo.against == "subtracted" else ()
    return taken_away(TensorPlan(undo.key, merged, undo.matrix, slabs), undo.gains, undo.dtype, device=device)


def taken_away(
    plan: TensorPlan, gains: Mapping[int, Gain], dtype: np.dtype[Any], *, device: Device | None = None
) -> Iterator[Array]:
    """R of all rows in order: a merged tensor with its update taken away, rounded to ``dtype``.

    Parameters
    ----------
    plan : TensorPlan
        Whose ``base`` is the merged tensor, and whose slabs say what was added to it.
    gains : mapping of int to Gain
        DoRA's, by the first row of their slab.
    dtype : dtype
        Of the base.
    device : Device or None
        Where the products of the update are made.
    """
    source, buffers = MatrixRows(plan.source, plan.matrix), (Buffer(), Buffer())
    products = {slab.start: slab.update(slices_for(dtype), device) for slab in plan.slabs}
    for start, stop, slab in cuts(plan):
        rows = source.rows(start, stop)
        if slab is None:
            yield rounded(rows, dtype)
            continue
        first, last = start - slab.start, stop - slab.start
        D = products[slab.start].rows(first, last, out=buffers[0].of(rows.shape))
        gain = gains.get(slab.start)
        found = gain.of(first, last) if gain else None
        yield removed(rows, D, dtype, gain=found, out=buffers[1].of(rows.shape))
