"""Weights that several processes share: the rows of each have the bits that they have in the whole weight."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from loralens.core import LazyArray
from loralens.merging.codec import prepare_merge
from loralens.merging.merge_record import MergeRecorder
from loralens.merging.planning import plan_merge
from loralens.merging.undo import TensorUndo, restored_rows
from loralens.merging.weight_slots import Shard
from tests.merging.made import CASES, DTYPES, Maker


def shares(height):
    """Ranges of uneven height, the last one empty."""
    edges = (0, height // 3, height // 3 + 1, height, height)
    return pairwise(edges)


@pytest.mark.some(15)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("made", CASES, ids=lambda made: made.__name__)
def test_the_rows_of_a_process_are_those_of_the_whole(made, dtype):
    case = made(Maker(1, dtype))
    divided = 0
    for key, tensor in plan_merge(case.adapters, case.lazy, **case.options).tensors.items():
        if tensor.base is None or tensor.base.shape != tensor.shape or tensor.scale is not None:
            continue
        W = case.base[key]
        if not Shard(W.shape, 0, W.shape[0]).divides(tensor.matrix):
            assert W.ndim == 1
            continue
        merged = np.concatenate([block.merged.copy() for block in prepare_merge(tensor).blocks()]).tobytes()
        for start, stop in shares(len(W)):
            own, shard = W[start:stop], Shard(W.shape, start, stop)
            # The norms of DoRA need all rows, which no other merge may read.
            base = LazyArray.of(W) if any(segment.magnitude for segment in tensor.segments) else shard.as_part(own)
            within = shard.rows_of(tensor.matrix)
            recorder = MergeRecorder(
                prepare_merge(replace(tensor, base=base), dtype=W.dtype, within=within), hashes=False, fidelity=False,
                undo=tensor.replacement is None, against="subtracted",
            )  # fmt: skip
            part = b"".join(rows.tobytes() for rows in recorder.blocks())
            assert part == merged[start * W[:1].nbytes : stop * W[:1].nbytes]
            if tensor.replacement is None:
                undo, there = TensorUndo.of(recorder.record()), np.frombuffer(part, W.dtype).reshape(own.shape)
                rows = restored_rows(undo, shard.as_part(there), within=within)
                assert b"".join(row.tobytes() for row in rows) == own.tobytes()
            divided += 1
    assert divided
