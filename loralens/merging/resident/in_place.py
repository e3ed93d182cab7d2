"""Merging a weight in its own memory with torch, and restoring it: a block of rows at a time, as few entries differ.

A change can be interrupted at any line and finished later. The numbers of a block are computed into buffers before the
first of them is written, and writing them twice has the same result.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, final

from numpy.typing import NDArray

from loralens.core.lazy import Array
from loralens.linalg.exact import NarrowProduct, SlicedBlock
from loralens.merging.plan import TensorPlan
from loralens.merging.resident.block_operations import (
    BlockMemory,
    Buffers,
    Coarse,
    Slices,
    as_tensor,
    in_blocks,
    subtract_coarse,
)
from loralens.merging.resident.differences import EntryReader, FewEntries, Found, code_entries, find_entries
from loralens.merging.undo.patch import Blob, bits

Task = tuple[tuple[str, float], ...]  # what is merged: names of adapters and their weights; empty for the base


@final
@dataclass(frozen=True, slots=True)
class RoundedMerge:
    """What restores the base of a weight that torch merged.

    Attributes
    ----------
    task : Task
        The task that is merged into the weight.
    plan : TensorPlan
        Only its matrix and the rows of its slabs are used.
    products : mapping of int to NarrowProduct
        D̃ by the first row of its slab.
    patch : FewEntries or Blob
        The patch relative to round(W' − D̃). A blob has the rows that have an update alone.
    """

    task: Task
    plan: TensorPlan
    products: Mapping[int, NarrowProduct]
    patch: FewEntries | Blob

    @property
    def patch_bytes(self) -> int:
        """Bytes of the patch."""
        return self.patch.nbytes

    @property
    def factor_bytes(self) -> int:
        """Bytes of the factors of D̃."""
        return sum(product.nbytes for product in self.products.values())

    @property
    def copy_bytes(self) -> int:
        """Bytes of a copy of the weight; there is none."""
        return 0


class UpdatedRows(NamedTuple):
    """Some rows of a weight that have an update.

    Attributes
    ----------
    rows : Tensor
    first : int
        The place of its first number in the weight.
    bits : array of unsigned integers
        The same numbers.
    coarse, B : Coarse, Tensor
        D̃ of the slab, and the rows of its left factor.
    slices, left : Slices or None, sequence of Tensor
        D of the slab, and the rows of its left slices.
    """

    rows: Any
    first: int
    bits: NDArray[Any]
    coarse: Coarse
    B: Any
    slices: Slices | None
    left: Sequence[Any]


def updated_rows(
    W: Array,
    plan: TensorPlan,
    products: Mapping[int, NarrowProduct],
    size: int,
    exact: Mapping[int, SlicedBlock] | None = None,
) -> Iterator[UpdatedRows]:
    """The rows of W that have an update, a block of ``size`` bytes at a time; with ``exact`` they have slices of D."""
    rows, numbers = as_tensor(W.reshape(plan.matrix)), bits(W)
    for slab in plan.slabs:
        coarse = Coarse.of(products[slab.start])
        slices = Slices.of(exact[slab.start]) if exact else None
        last = slab.start * plan.matrix[1]
        updated = rows[slab.start : slab.stop]
        for block, B, *left in in_blocks(size, updated, coarse.B, *(slices.left if slices else ())):
            first, last = last, last + block.numel()
            yield UpdatedRows(block, first, numbers[first:last], coarse, B, slices, left)


@final
class MergeInPlace:
    """The change of W into W' = round(W + D) in the memory of W, where few entries differ.

    Attributes
    ----------
    task, plan, products
        Those of the `RoundedMerge`.
    memory : BlockMemory
        The buffers, which nothing else may use until the change is finished.
    """

    __slots__ = ("_blocks", "_found", "_place", "_size", "memory", "plan", "products", "task")

    def __init__(
        self,
        W: Array,
        plan: TensorPlan,
        task: Task,
        products: Mapping[int, NarrowProduct],
        exact: Mapping[int, SlicedBlock],
        memory: BlockMemory,
    ) -> None:
        self.plan, self.task, self.products = plan, task, products
        self.memory, self._size = memory, W.size
        self._blocks = list(updated_rows(W, plan, products, memory.size, exact))
        self._found: list[Found] = []
        # The next block, and the buffers in which its numbers are ready.
        self._place: tuple[int, Buffers | None] = (0, None)
        self._compute()

    @classmethod
    def begin(cls, W: Array, *arguments: Any, few: float) -> Self | None:
        """Compute the first block. None if more than a share ``few`` of its entries differ; W is then unchanged."""
        change = cls(W, *arguments)
        # As all blocks of a weight are alike, the first one decides.
        return change if change._found[0][0].size <= few * change._blocks[0].rows.numel() else None

    def finish(self) -> RoundedMerge:
        """Change all blocks that have not been changed yet, and return what restores the base."""
        while self._place[0] < len(self._blocks):
            number, buffers = self._place
            if buffers is None:
                self._compute()
                continue
            self._blocks[number].rows.copy_(buffers.changed)
            self._place = number + 1, None
        return RoundedMerge(self.task, self.plan, self.products, code_entries(self._found, self._size))

    def _compute(self) -> None:
        """Compute W' and the entries that differ for the next block."""
        number = self._place[0]
        block = self._blocks[number]
        assert block.slices is not None
        buffers = self.memory.of(block.rows)
        block.slices.add(block.rows, block.left, buffers, out=buffers.changed)
        if block.rows.itemsize == 2:
            block.coarse.multiply(block.B, buffers)
        subtract_coarse(buffers.changed, buffers, out=buffers.rounded)
        # An interruption may have left the entries of the same block.
        self._found[number:] = [find_entries(block.bits, buffers.bits, block.first)]
        self._place = number, buffers


@final
class RestoreInPlace:
    """The change of a merged weight into W in its memory. ``undo`` has few entries."""

    __slots__ = ("_blocks", "_entries", "_place", "memory")

    def __init__(self, W: Array, undo: RoundedMerge, memory: BlockMemory) -> None:
        assert isinstance(undo.patch, FewEntries)
        self.memory = memory
        self._blocks = list(updated_rows(W, undo.plan, undo.products, memory.size))
        self._entries = EntryReader(undo.patch)
        # The next block, and the buffers in which W' − D̃ is ready.
        self._place: tuple[int, Buffers | None] = (0, None)

    def finish(self) -> None:
        """Change all blocks that have not been changed yet."""
        while self._place[0] < len(self._blocks):
            number, buffers = self._place
            block = self._blocks[number]
            if buffers is None:
                buffers = self.memory.of(block.rows)
                block.coarse.multiply(block.B, buffers)
                subtract_coarse(block.rows, buffers, out=buffers.total)
                self._place = number, buffers
            block.rows.copy_(buffers.total)
            self._entries.correct(block.bits, block.first)
            self._place = number + 1, None
