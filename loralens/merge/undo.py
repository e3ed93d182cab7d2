"""Unmerging: the base back from a merged tensor, bit for bit, and proof that it is the base."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.errors import MismatchError
from loralens.linalg.exact import Singles
from loralens.merge.apply import Gain, MatrixRows, cuts
from loralens.merge.patch import Blob, PatchReader
from loralens.merge.plan import Slab, TensorPlan
from loralens.merge.record import Against
from loralens.merge.rounding import removed, slices_for


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


def restored(undo: TensorUndo, merged: LazyArray) -> Iterator[Array]:
    """The rows of the base tensor in order.

    Parameters
    ----------
    undo : TensorUndo
    merged : LazyArray
        The tensor as it stands in the merged model.

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
    for rows in _subtracted(undo, merged):
        W = reader.block(rows)
        digest.update(np.ascontiguousarray(W).reshape(-1).view(np.uint8).data)
        yield W
    reader.finish()
    if digest.hexdigest() != undo.base_hash:
        raise MismatchError(
            f"{undo.key}: what came out is not the base that was merged",
            fix="the undo file is damaged: use another copy",
        )


def _check_merged(undo: TensorUndo, merged: LazyArray) -> None:
    digest = sha256()
    plan = TensorPlan(undo.key, merged, undo.matrix if merged.shape == undo.shape else (1, merged.size))
    source = MatrixRows(merged, plan.matrix)
    for start, stop, _ in cuts(plan):
        digest.update(np.ascontiguousarray(source.rows(start, stop)).reshape(-1).view(np.uint8).data)
    if digest.hexdigest() != undo.merged_hash:
        raise MismatchError(
            f"{undo.key} is not as it was merged: it was changed since, or belongs to another merge",
            fix="give the model that this undo file was written for; adapters merged later are unmerged first",
        )


def _subtracted(undo: TensorUndo, merged: LazyArray) -> Iterator[Array]:
    """R: the merged rows with the update taken away, in the dtype of the base."""
    plan = TensorPlan(undo.key, merged, undo.matrix, undo.slabs)
    if undo.against == "nothing":
        yield np.zeros(undo.shape, undo.dtype).reshape(1, -1)
        return
    source = MatrixRows(merged, undo.matrix)
    products = {slab.start: slab.update(slices_for(undo.dtype)) for slab in undo.slabs}
    buffer: Singles = np.empty(0, np.float32)
    for start, stop, slab in cuts(plan):
        rows = source.rows(start, stop)
        if slab is None or undo.against == "merged":
            yield rows.astype(undo.dtype)
            continue
        if buffer.size < rows.size:
            buffer = np.empty(rows.size, np.float32)
        first, last = start - slab.start, stop - slab.start
        D = products[slab.start].rows(first, last, out=buffer[: rows.size].reshape(rows.shape))
        gain = undo.gains.get(slab.start)
        yield removed(rows, D, undo.dtype, gain=gain.of(first, last) if gain else None)
