"""The record of the merge of one stored tensor: fidelity of its modules, hashes, and the patch that undoes it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, final

import numpy as np

from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.merging.apply import MergedBlock, TensorMerge
from loralens.merging.dora_factors import DoraFactors
from loralens.merging.fidelity import Fidelity, FidelitySums
from loralens.merging.matrix import Buffer, MatrixRows
from loralens.merging.plan import TensorPlan, as_matrix
from loralens.merging.rounding import round_sums
from loralens.merging.undo.patch import Blob, Keep, PatchWriter, keep_in_memory

Against = Literal["subtracted", "merged", "nothing", "codes"]


@final
@dataclass(frozen=True, slots=True)
class StoredCodes:
    """The stored tensor of a coded weight: its key, the name of its layout, its dtype and its shape."""

    key: str
    layout: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class TensorRecord:
    """The record of the merge of one stored tensor.

    Attributes
    ----------
    dtype : dtype
        The dtype of the merged tensor.
    fidelity : tuple of Fidelity
        One for each slab.
    base_hash, merged_hash : str
        SHA-256 of the bytes of the tensor before and after the merge; empty if it was not requested, or if there was no
        such tensor.
    patch : Blob or None
        The patch that restores the base, if requested.
    patch_bytes : int
        Size of the patch. It stays known when the patch itself has been written to a file.
    against : str
        What the patch is relative to: W' − D rounded (``subtracted``), W' itself (``merged``), zeros (``nothing``), or
        the merged codes of a low-bit weight (``codes``).
    slab_factors : dict of int to DoraFactors
        DoRA's factors by the first row of their slab.
    stored : StoredCodes or None
        The stored tensor of a low-bit weight whose codes were moved; the plan is that of the decoded weight.
    """

    plan: TensorPlan
    dtype: np.dtype[Any]
    fidelity: tuple[Fidelity, ...]
    base_hash: str
    merged_hash: str
    patch: Blob | None
    patch_bytes: int
    against: Against
    slab_factors: dict[int, DoraFactors]
    stored: StoredCodes | None = None


@final
class MergeRecorder:
    """Records the blocks of one tensor while they are merged.

    Parameters
    ----------
    merge : TensorMerge
    hashes, fidelity, undo : bool
        What to record. Each of them takes time.
    keep : callable
        Stores parts of the patch while it is made (see `PatchWriter`).
    """

    def __init__(
        self,
        merge: TensorMerge,
        *,
        hashes: bool = True,
        fidelity: bool = True,
        undo: bool = True,
        keep: Keep = keep_in_memory,
    ) -> None:
        base = merge.plan.base
        self._merge, self._against, self._fidelity = merge, patch_reference(merge), fidelity
        self._before = sha256() if hashes and base is not None else None
        self._after = sha256() if hashes else None
        self._patch = PatchWriter(base.dtype.itemsize, keep) if undo and base is not None else None
        self._sums: dict[int, FidelitySums] = {}

    def blocks(self) -> Iterator[Array]:
        """Yield the merged rows in order. When all have been taken, `record` is complete."""
        replaced, buffer = self._merge.plan.replacement is not None, Buffer()
        for block in self._merge.blocks():
            feed_hash(self._after, block.merged)
            if self._fidelity and block.slab:
                # Blocks come in order, and a slab may have many of them.
                if block.slab.start not in self._sums:
                    self._sums[block.slab.start] = FidelitySums(block.slab, self._merge)
                self._sums[block.slab.start].take(block)
            if not replaced:
                feed_hash(self._before, block.stored)
                if self._patch is not None:
                    self._patch.block(block.stored, self._patch_start(block, buffer))
            yield block.merged
        # The rows of a replacement are not those of the base, so the base is read separately, after them.
        if replaced:
            self._take_base()

    def _patch_start(self, block: MergedBlock, buffer: Buffer) -> Array:
        """The rows to which the patch is relative."""
        if self._against == "subtracted":
            return block.subtract(buffer.of(block.stored.shape))
        if self._against == "merged":
            return round_sums(block.merged, block.stored.dtype)
        # If the patch refers to zeros, it holds the whole tensor.
        return np.zeros_like(block.stored)

    def _take_base(self) -> None:
        """Hash the base tensor of a replaced one, and store it in the patch."""
        base = self._merge.plan.base
        # Nothing to record: reading the tensor would only cost time.
        if base is None or (self._before is None and self._patch is None):
            return
        for rows in MatrixRows(base, as_matrix(base.shape)).blocks():
            feed_hash(self._before, rows)
            if self._patch is not None:
                self._patch.block(rows, np.zeros_like(rows))

    def record(self) -> TensorRecord:
        """The record of all blocks."""
        patch = self._patch.finish() if self._patch else None
        return TensorRecord(
            self._merge.plan,
            self._merge.dtype,
            tuple(sums.fidelity() for _, sums in sorted(self._sums.items())),
            self._before.hexdigest() if self._before else "",
            self._after.hexdigest() if self._after else "",
            patch,
            patch.nbytes if patch else 0,
            self._against,
            self._merge.slab_factors,
        )


def patch_reference(merge: TensorMerge) -> Against:
    """What the patch of a tensor is relative to; D is subtracted only if unmerging can compute it from factors."""
    plan = merge.plan
    # The merged numbers say nothing about the base: it was replaced, or stored in float8 and written in another dtype.
    if plan.replacement is not None or (plan.scale is not None and not merge.requantised):
        return "nothing"
    terms = [update for slab in plan.slabs for _, update in slab.terms]
    # Only pairs are stored in an undo file; other forms would need all their parts.
    if plan.scale is None and terms and all(isinstance(update, LowRank) for update in terms):
        return "subtracted"
    return "merged"


def hash_rows(blocks: Iterable[Array]) -> str:
    """The SHA-256 of the bytes of a tensor, given in blocks of rows, in hexadecimal digits; ``nbytes`` is its size."""
    digest = sha256()
    for rows in blocks:
        feed_hash(digest, rows)
    return digest.hexdigest()


def feed_hash(digest: Any | None, rows: Array) -> None:
    """Add the bytes of some rows to a hash; ``digest`` is None if no hash was requested."""
    if digest is not None:
        digest.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
