"""A merge in floats whose weight is quantised once to a block type of ggml, as a GGUF file stores it."""

from collections.abc import Iterator
from hashlib import sha256
from math import prod
from typing import final

import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import Array
from loralens.errors import FormatError
from loralens.linalg.few_bits.ggml_blocks import BLOCK, BlockType
from loralens.merging.apply import TensorMerge
from loralens.merging.low_bit.measure import QuantisedSums
from loralens.merging.low_bit.record import in_file_order
from loralens.merging.plan import TensorPlan
from loralens.merging.record import StoredCodes, TensorRecord, feed_hash


def stored_shape(type_: BlockType, plan: TensorPlan) -> tuple[int, int]:
    """The rows of a weight, and the bytes of each."""
    return plan.matrix[0], plan.matrix[1] // BLOCK * type_.nbytes


@final
class BlocksRecorder:
    """Quantises the rows of a merged weight, and records the merge.

    Parameters
    ----------
    merge : TensorMerge
        In float32.
    type_ : BlockType
    order : intp array or None
        The position of every row in the file; None: rows lie in order.
    hashes, fidelity : bool
        What to record.
    """

    def __init__(
        self,
        merge: TensorMerge,
        type_: BlockType,
        *,
        order: NDArray[np.intp] | None,
        hashes: bool,
        fidelity: bool,
    ) -> None:
        self._merge, self._type, self._order, self._fidelity = merge, type_, order, fidelity
        self._before = sha256() if hashes else None
        self._after = sha256() if hashes else None
        self._sums: dict[int, QuantisedSums] = {}

    def blocks(self) -> Iterator[Array]:
        """Yield the bytes of the rows in their own order. When all have been taken, `record` is complete."""
        waiting: list[tuple[int, NDArray[np.uint8]]] = []
        for block in self._merge.blocks():
            feed_hash(self._before, block.stored)
            numbers = block.merged.astype(np.float32, copy=False)
            quantised = self._type.quantise(np.ascontiguousarray(numbers).reshape(-1, BLOCK))
            # Scales are float16. An infinite one would turn the 32 numbers of its block into NaN or infinity.
            if not np.isfinite(quantised.numbers).all() and np.isfinite(numbers).all():
                what = f"{self._merge.plan.key}: numbers are too large for the float16 scales of {self._type.name}"
                raise FormatError(what, fix="check the adapter's α with loralens doctor, or merge with --dtype")
            if self._fidelity and block.slab:
                sums = self._sums.setdefault(block.slab.start, QuantisedSums(block.slab))
                sums.take(block, quantised.numbers.reshape(numbers.shape))
            rows = quantised.stored.reshape(len(numbers), -1)
            # The bytes are hashed as the file has them.
            if self._order is None:
                feed_hash(self._after, rows)
            elif self._after is not None:
                waiting.append((block.start, rows))
            yield rows
        for tensor in in_file_order(self._order, iter(waiting)) if self._order is not None else ():
            feed_hash(self._after, tensor)

    def record(self) -> TensorRecord:
        """The record of all blocks."""
        plan, dtype = self._merge.plan, np.dtype(np.uint8)
        return TensorRecord(
            plan,
            dtype,
            tuple(sums.fidelity() for _, sums in sorted(self._sums.items())),
            self._before.hexdigest() if self._before else "",
            self._after.hexdigest() if self._after else "",
            None,
            0,
            "nothing",
            {},
            StoredCodes(plan.key, self._type.name, dtype, (prod(stored_shape(self._type, plan)),)),
        )
