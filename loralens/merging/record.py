"""What was merged into one stored tensor, as it happened: fidelity of every module, hashes, the undo patch."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, final

import numpy as np

from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.merging.apply import Block, TensorMerge
from loralens.merging.fidelity import Fidelity, FidelitySums
from loralens.merging.gain import Gain
from loralens.merging.matrix import Buffer, MatrixRows
from loralens.merging.plan import TensorPlan, as_matrix
from loralens.merging.rounding import rounded
from loralens.merging.undo.patch import Blob, Keep, PatchWriter, in_memory

Against = Literal["subtracted", "merged", "nothing"]


@final
@dataclass(frozen=True, slots=True)
class TensorRecord:
    """What happened to one stored tensor.

    Attributes
    ----------
    plan : TensorPlan
    dtype : dtype
        Of the merged tensor.
    fidelity : tuple of Fidelity
        One for each slab.
    base_hash, merged_hash : str
        SHA-256 of the bytes of the tensor before and after; empty where not asked for, or there was no tensor.
    patch : Blob or None
        What gives the base back, where asked for.
    patch_bytes : int
        Its size, also when the patch itself has been put away.
    against : str
        What the patch is relative to: W' − D rounded (``subtracted``), W' itself (``merged``), or ``nothing``.
    gains : dict of int to Gain
        DoRA's, by the first row of their slab.
    """

    plan: TensorPlan
    dtype: np.dtype[Any]
    fidelity: tuple[Fidelity, ...]
    base_hash: str
    merged_hash: str
    patch: Blob | None
    patch_bytes: int
    against: Against
    gains: dict[int, Gain]


@final
class Watch:
    """Looks at the blocks of one tensor as they are merged.

    Parameters
    ----------
    merge : TensorMerge
    hashes, fidelity, undo : bool
        What to keep; each costs time.
    keep : callable
        Where the patch goes while it is made.
    """

    def __init__(
        self,
        merge: TensorMerge,
        *,
        hashes: bool = True,
        fidelity: bool = True,
        undo: bool = True,
        keep: Keep = in_memory,
    ) -> None:
        base = merge.plan.base
        self._merge, self._against, self._fidelity = merge, against(merge), fidelity
        self._before = sha256() if hashes and base is not None else None
        self._after = sha256() if hashes else None
        self._patch = PatchWriter(base.dtype.itemsize, keep) if undo and base is not None else None
        self._sums: dict[int, FidelitySums] = {}

    def blocks(self) -> Iterator[Array]:
        """The merged rows in order; when they are exhausted, `record` is complete."""
        replaced, buffer = self._merge.plan.replacement is not None, Buffer()
        for block in self._merge.blocks():
            feed(self._after, block.merged)
            if self._fidelity and block.slab:
                if block.slab.start not in self._sums:
                    self._sums[block.slab.start] = FidelitySums(block.slab, self._merge)
                self._sums[block.slab.start].take(block)
            if not replaced:
                feed(self._before, block.stored)
                if self._patch is not None:
                    self._patch.block(block.stored, self._start(block, buffer))
            yield block.merged
        if replaced:
            self._see_base()

    def _start(self, block: Block, buffer: Buffer) -> Array:
        """What the patch of some rows begins with."""
        if self._against == "subtracted":
            return block.subtracted(buffer.of(block.stored.shape))
        if self._against == "merged":
            return rounded(block.merged, block.stored.dtype)
        return np.zeros_like(block.stored)

    def _see_base(self) -> None:
        """Hash and keep the base tensor that something else stands for now."""
        base = self._merge.plan.base
        if base is None or (self._before is None and self._patch is None):
            return
        for rows in MatrixRows(base, as_matrix(base.shape)).blocks():
            feed(self._before, rows)
            if self._patch is not None:
                self._patch.block(rows, np.zeros_like(rows))

    def record(self) -> TensorRecord:
        """What was seen."""
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
            self._merge.gains,
        )


def against(merge: TensorMerge) -> Against:
    """What the patch of a tensor is relative to: D is taken away where it can be made again from factors alone."""
    plan = merge.plan
    if plan.replacement is not None or (plan.scale is not None and not merge.requantised):
        return "nothing"
    terms = [one for slab in plan.slabs for _, one in slab.terms]
    if plan.scale is None and terms and all(isinstance(one, LowRank) for one in terms):
        return "subtracted"
    return "merged"


def feed(digest: Any, rows: Array) -> None:
    """Hash the bytes of some rows; nothing where ``digest`` is None, as nobody wants to know."""
    if digest is not None:
        digest.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
