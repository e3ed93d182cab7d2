"""Weights that several processes share: the rows of each have the bits that they have in the whole weight."""

from itertools import pairwise

import numpy as np
import pytest

from loralens.core.lazy import LazyArray
from loralens.merging.make_plan import plan_merge
from loralens.merging.resident.resident import merge_weight, restore_weight
from loralens.merging.resident.shards import Shard
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
        merged, _ = merge_weight(W, tensor, ())
        for start, stop in shares(len(W)):
            own, shard = W[start:stop], Shard(W.shape, start, stop)
            part, undo = merge_weight(own, tensor, (), shard=shard, whole_weight=LazyArray.of(W))
            assert part.tobytes() == merged[start:stop].tobytes()
            assert restore_weight(part, undo).tobytes() == own.tobytes()
            divided += 1
    assert divided


def test_rows_of_other_processes_cannot_be_read():
    part = Shard((4, 2), 1, 3).as_part(np.arange(4.0).reshape(2, 2))
    np.testing.assert_array_equal(part.rows(1, 3).read(), [[0, 1], [2, 3]])
    for start, stop in ((0, 1), (1, 4)):
        with pytest.raises(AssertionError):
            part.rows(start, stop).read()
    with pytest.raises(AssertionError):
        part.read()
