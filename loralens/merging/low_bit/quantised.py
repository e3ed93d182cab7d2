"""The record of a merge in floats whose weight is quantised once: hashes, and how much of every update arrives."""

from hashlib import sha256
from typing import final

from loralens.core.lazy import Array
from loralens.linalg.exact import Singles
from loralens.merging.apply import MergedBlock
from loralens.merging.low_bit.measure import QuantisedSums
from loralens.merging.plan import TensorPlan
from loralens.merging.record import StoredCodes, TensorRecord, feed_hash


@final
class QuantisedRecord:
    """Collects the record of one stored tensor of a quantised weight, block by block.

    Parameters
    ----------
    plan : TensorPlan
        The plan of the weight in floats.
    stored : StoredCodes
        The tensor that is written.
    hash_base, hash_merged, fidelity : bool
        What to record.
    """

    def __init__(
        self, plan: TensorPlan, stored: StoredCodes, *, hash_base: bool, hash_merged: bool, fidelity: bool
    ) -> None:
        self._plan, self._stored, self._fidelity = plan, stored, fidelity
        self._before = sha256() if hash_base else None
        self._after = sha256() if hash_merged else None
        self._sums: dict[int, QuantisedSums] = {}

    def take_base(self, block: MergedBlock) -> None:
        """Hash the next rows of the base."""
        feed_hash(self._before, block.stored)

    def take_numbers(self, block: MergedBlock, quantised: Singles) -> None:
        """Measure the next rows by the numbers that they are quantised to, in the shape of the block."""
        if self._fidelity and block.slab:
            # Blocks come in order, and a slab may have many of them.
            self._sums.setdefault(block.slab.start, QuantisedSums(block.slab)).take(block, quantised)

    def take_stored(self, rows: Array) -> None:
        """Hash the next rows of the tensor that is written, in the order of the file."""
        feed_hash(self._after, rows)

    def record(self) -> TensorRecord:
        """The record of all blocks; it has no patch, since the codes say nothing about the base."""
        return TensorRecord(
            self._plan,
            self._stored.dtype,
            tuple(sums.fidelity() for _, sums in sorted(self._sums.items())),
            self._before.hexdigest() if self._before else "",
            self._after.hexdigest() if self._after else "",
            None,
            0,
            "nothing",
            {},
            self._stored,
        )
