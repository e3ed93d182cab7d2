"""A merge in floats that is quantised to NF4 once, as bitsandbytes stores it: codes, scales, levels and a description.

W + ΔW is not rounded to another dtype before it is quantised. The numbers of a base in 16 bits lie off the grid, so an
update moves some of them over a boundary, and on average all of it arrives.
"""

import json
from collections.abc import Iterator
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import Array
from loralens.linalg.codes import BLOCK, LEVELS, dequantise_nf4, quantise_nf4
from loralens.merging.apply import TensorMerge
from loralens.merging.low_bit.quantised import QuantisedRecord
from loralens.merging.plan import TensorPlan
from loralens.merging.record import StoredCodes, TensorRecord

Part = Literal["", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"]
PARTS: tuple[Part, ...] = ("", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4")


def part_shape(part: Part, plan: TensorPlan) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The dtype and shape of a part of a weight as it is stored; the part is the end of its key."""
    size = plan.matrix[0] * plan.matrix[1]
    if part == "":
        return np.dtype(np.uint8), (-(-size // 2), 1)
    if part == ".absmax":
        return np.dtype(np.float32), (-(-size // BLOCK),)
    if part == ".quant_map":
        return np.dtype(np.float32), (len(LEVELS),)
    return np.dtype(np.uint8), (len(_state(plan)),)


def _state(plan: TensorPlan) -> Array:
    """The description of a weight, as bitsandbytes packs it."""
    # bitsandbytes decodes the weight to this dtype for its products: the dtype that the base has.
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": str(plan.dtype), "shape": list(plan.shape)}
    return np.frombuffer(json.dumps(state).encode("utf-8"), np.uint8)


@final
class Nf4Recorder:
    """Makes one part of a quantised weight, and records the merge with the codes.

    Parameters
    ----------
    merge : TensorMerge
        A merge in float32.
    part : str
    hashes, fidelity : bool
        What to record.
    """

    def __init__(self, merge: TensorMerge, part: Part, *, hashes: bool, fidelity: bool) -> None:
        self._merge, self._part = merge, part
        codes, plan = part == "", merge.plan
        # The fidelity is measured on whole rows, so each row must consist of whole blocks.
        self._measured = fidelity and codes and plan.matrix[1] % BLOCK == 0
        self._record = QuantisedRecord(
            plan,
            StoredCodes(plan.key + part, "bitsandbytes NF4", *part_shape(part, plan)),
            hash_base=hashes and codes and plan.base is not None,
            hash_merged=hashes,
            fidelity=self._measured,
        )

    def blocks(self) -> Iterator[Array]:
        """Yield the part in order. When all has been taken, `record` is complete."""
        for numbers in self._new_rows():
            self._record.take_stored(numbers)
            yield numbers

    def _new_rows(self) -> Iterator[Array]:
        if self._part == ".quant_map":
            yield LEVELS
        elif self._part == ".quant_state.bitsandbytes__nf4":
            yield _state(self._merge.plan)
        else:
            yield from self._quantise_rows()

    def _quantise_rows(self) -> Iterator[Array]:
        pending = np.empty(0, np.float32)
        total, done = self._merge.plan.matrix[0] * self._merge.plan.matrix[1], 0
        for block in self._merge.blocks():
            self._record.take_base(block)
            numbers = block.merged.astype(np.float32, copy=False).reshape(-1)
            done += numbers.size
            # A block of 64 may go on in the next rows.
            pending = np.concatenate([pending, numbers]) if pending.size else numbers
            size = pending.size if done == total else pending.size // BLOCK * BLOCK
            codes, absmax = quantise_nf4(pending[:size])
            if self._measured:
                self._record.take_numbers(block, dequantise_nf4(codes, absmax).reshape(block.merged.shape))
            pending = pending[size:].copy()
            yield absmax if self._part else _pack_nibbles(codes)

    def record(self) -> TensorRecord:
        """The record of all blocks; that of a part beside the codes has only a hash."""
        return self._record.record()


def _pack_nibbles(codes: NDArray[np.uint8]) -> Array:
    """Two codes in a byte, the first in the high nibble, shape (bytes, 1)."""
    if codes.size % 2:
        # The byte that is left over holds the code of 0, as bitsandbytes pads the numbers.
        codes = np.append(codes, np.uint8(7))
    return ((codes[::2] << 4) | codes[1::2])[:, None]
