"""A merge in floats whose weight is quantised once to a block type of ggml, as a GGUF file stores it."""

from collections.abc import Iterator
from math import prod
from typing import final

import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import Array
from loralens.errors import FormatError
from loralens.linalg.codes import GGML_BLOCK, BlockType
from loralens.merging.apply import TensorMerge
from loralens.merging.low_bit.quantised import QuantisedRecord
from loralens.merging.low_bit.record import tensor_in_file_order
from loralens.merging.plan import TensorPlan
from loralens.merging.record import StoredCodes, TensorRecord


def stored_shape(type_: BlockType, plan: TensorPlan) -> tuple[int, int]:
    """The rows of a weight, and the bytes of each."""
    return plan.matrix[0], plan.matrix[1] // GGML_BLOCK * type_.nbytes


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
        self._merge, self._type, self._order, self._hashes = merge, type_, order, hashes
        plan, dtype = merge.plan, np.dtype(np.uint8)
        stored = StoredCodes(plan.key, type_.name, dtype, (prod(stored_shape(type_, plan)),))
        self._record = QuantisedRecord(plan, stored, hash_base=hashes, hash_merged=hashes, fidelity=fidelity)

    def blocks(self) -> Iterator[Array]:
        """Yield the bytes of the rows in their own order. When all have been taken, `record` is complete."""
        waiting: list[tuple[int, NDArray[np.uint8]]] = []
        for block in self._merge.blocks():
            self._record.take_base(block)
            numbers = block.merged.astype(np.float32, copy=False)
            quantised = self._type.quantise(np.ascontiguousarray(numbers).reshape(-1, GGML_BLOCK))
            # Scales are float16. An infinite one would turn the 32 numbers of its block into NaN or infinity.
            if not np.isfinite(quantised.numbers).all() and np.isfinite(numbers).all():
                what = f"{self._merge.plan.key}: numbers are too large for the float16 scales of {self._type.name}"
                raise FormatError(what, fix="check the adapter's α with loralens doctor, or merge with --dtype")
            self._record.take_numbers(block, quantised.numbers.reshape(numbers.shape))
            rows = quantised.stored.reshape(len(numbers), -1)
            # The bytes are hashed as the file has them.
            if self._order is None:
                self._record.take_stored(rows)
            elif self._hashes:
                waiting.append((block.start, rows))
            yield rows
        for tensor in tensor_in_file_order(self._order, iter(waiting)) if self._order is not None else ():
            self._record.take_stored(tensor)

    def record(self) -> TensorRecord:
        """The record of all blocks."""
        return self._record.record()
