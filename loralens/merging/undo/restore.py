"""Unmerging with a patch: a merged tensor becomes the tensor of the base, bit for bit, and hashes prove it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.errors import MismatchError
from loralens.linalg.device import Device
from loralens.merging.dora_factors import DoraFactors
from loralens.merging.matrix import Buffer, MatrixRows, cuts
from loralens.merging.plan import Slab, TensorPlan, as_matrix
from loralens.merging.record import Against, feed_hash, hash_rows
from loralens.merging.rounding import round_sums, slices_for, subtract_update
from loralens.merging.undo.patch import Blob, PatchReader
from loralens.merging.update import row_ranges


@final
@dataclass(frozen=True, slots=True)
class TensorUndo:
    """Everything that is needed to restore one tensor of the base from the merged one.

    Attributes
    ----------
    dtype : dtype
        The dtype of the base.
    shape, matrix : tuple of int
        The shape of the base tensor, and its number of rows and columns as a matrix.
    slabs : tuple of Slab
        Their terms hold the factors that were merged.
    slab_factors : dict of int to DoraFactors
        DoRA's factors by the first row of their slab.
    against : str
        What the patch is relative to (see `TensorRecord`).
    base_hash, merged_hash : str
        SHA-256 of the bytes.
    weight : str
        If the patch restores the codes of a low-bit weight, the key of the decoded weight; else empty.
    """

    key: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    slabs: tuple[Slab, ...]
    slab_factors: dict[int, DoraFactors]
    patch: Blob
    against: Against
    base_hash: str
    merged_hash: str
    weight: str = ""


def restore_tensor(undo: TensorUndo, merged: LazyArray, *, device: Device | None = None) -> Iterator[Array]:
    """Yield the rows of the base tensor in order.

    Parameters
    ----------
    undo : TensorUndo
    merged : LazyArray
        The tensor of the merged model.
    device : Device or None
        The device that multiplies the factors of the update.

    Raises
    ------
    MismatchError
        The tensor is not the one that the merge wrote, which is checked before the first row; or the result is not the
        base, which is checked after the last row.
    FormatError
        The patch is damaged.
    """
    # Checked before the first row is yielded: a patch applied to other numbers gives a model that is silently wrong.
    check_merged(undo, merged)
    reader, digest = PatchReader(undo.patch, undo.dtype.itemsize), sha256()
    for rows in _patch_start(undo, merged, device):
        W = reader.block(rows)
        feed_hash(digest, W)
        yield W
    # If entries of the patch are left over, the patch is damaged or belongs to another tensor: this is an error.
    reader.finish()
    check_restored(undo, digest.hexdigest())


def check_restored(undo: TensorUndo, digest: str) -> None:
    """Refuse a restored tensor whose SHA-256 is not that of the base.

    Raises
    ------
    MismatchError
        It differs.
    """
    # The hash covers every bit of the base, so this comparison proves that the result is exact.
    if digest != undo.base_hash:
        raise MismatchError(
            "the restored tensor is not the base that was merged",
            fix="the undo file is damaged: use another copy",
        )


def check_merged(undo: TensorUndo, merged: LazyArray) -> None:
    """Check by its hash that a tensor has the bytes that the merge wrote.

    Raises
    ------
    MismatchError
        It has other bytes.
    """
    # ``undo.matrix`` is the matrix of the base, or of the decoded numbers of a low-bit weight. It fits neither a tensor
    # that the merge resized, nor the stored codes.
    matrix = undo.matrix if merged.shape == undo.shape and not undo.weight else as_matrix(merged.shape)
    if hash_rows(MatrixRows(merged, matrix).blocks()) != undo.merged_hash:
        raise MismatchError(
            "is not as it was merged: it was changed since, or belongs to another merge",
            fix="give the model that this undo file was written for; if adapters were merged later, unmerge them first",
        )


def _patch_start(undo: TensorUndo, merged: LazyArray, device: Device | None) -> Iterator[Array]:
    """The rows to which the patch is relative, in the dtype of the base."""
    if undo.against == "nothing":
        # Zeros block by block, so that no array of the size of the tensor is made.
        return (np.zeros((stop - start, undo.matrix[1]), undo.dtype) for start, stop in row_ranges(*undo.matrix))
    # If the patch refers to the merged numbers themselves, there is nothing to subtract.
    slabs = undo.slabs if undo.against == "subtracted" else ()
    return subtract_updates(
        TensorPlan(undo.key, merged, undo.matrix, slabs), undo.slab_factors, undo.dtype, device=device
    )


def subtract_updates(
    plan: TensorPlan,
    slab_factors: Mapping[int, DoraFactors],
    dtype: np.dtype[Any],
    *,
    device: Device | None = None,
    within: tuple[int, int] | None = None,
) -> Iterator[Array]:
    """Yield the rows of R in order, where R is a merged tensor minus its update, rounded to ``dtype``.

    Parameters
    ----------
    plan : TensorPlan
        Its ``base`` is the merged tensor, and its slabs are the updates that were added.
    slab_factors : mapping of int to DoraFactors
        DoRA's factors by the first row of their slab.
    dtype : dtype
        The dtype of the base.
    device : Device or None
        The device that multiplies the factors of the update.
    within : (int, int) or None
        The range of rows, as in `prepare_merge`.
    """
    source, buffers = MatrixRows(plan.source, plan.matrix), (Buffer(), Buffer())
    products = {slab.start: slab.update(slices_for(dtype), device) for slab in plan.slabs}
    for start, stop, slab in cuts(plan, within=within):
        rows = source.rows(start, stop)
        if slab is None:
            yield round_sums(rows, dtype)
            continue
        first, last = start - slab.start, stop - slab.start
        D = products[slab.start].rows(first, last, out=buffers[0].of(rows.shape))
        dora_factors = slab_factors.get(slab.start)
        factors = dora_factors.of(first, last) if dora_factors else None
        yield subtract_update(rows, D, dtype, dora_factors=factors, out=buffers[1].of(rows.shape))
