"""Merging weights with torch: the bits of a merge, and the base again."""

import ml_dtypes
import numpy as np
import pytest

from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank
from loralens.merging.apply import prepare_merge
from loralens.merging.plan import Slab, TensorPlan
from loralens.merging.resident import block_operations
from loralens.merging.resident.by_torch import merge_by_torch, restore_by_torch
from loralens.merging.undo.patch import Blob, bits

torch = pytest.importorskip("torch")
TASK = (("a", 1.0),)


def case(dtype, shape=(33, 50), *, size=1e-3, transposed=False, seed=0):
    rng = np.random.default_rng(seed)
    W = (0.02 * rng.standard_normal(shape)).astype(dtype)
    W[0, :3] = [0.0, -0.0, 1e-30]
    out, in_ = shape[::-1] if transposed else shape
    B, A = rng.standard_normal((out, 5)).astype(np.float32), rng.standard_normal((5, in_)).astype(np.float32)
    # A rank index without effect, a row that is zero, and one that is far below the range of the rounded factors.
    A[4], B[1], B[2] = 0, 0, 1e-25
    slab = Slab("a", 0, shape[0], ((0.7, LowRank(B, A, size)),), transposed)
    return W, TensorPlan("a.weight", LazyArray.of(W), shape, (slab,))


def as_merged(plan):
    return np.concatenate([block.merged.copy() for block in prepare_merge(plan).blocks()])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("size", [1e-7, 5e-5, 1e-3, 1e6])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_weight_is_that_of_a_merge_and_comes_back(dtype, size, transposed, monkeypatch):
    monkeypatch.setattr(block_operations, "BLOCK", 800)  # several blocks, the last of another height
    W, plan = case(dtype, size=size, transposed=transposed)
    merged, undo = merge_by_torch(W, plan, TASK)
    assert np.array_equal(bits(merged), bits(as_merged(plan)))
    assert np.array_equal(bits(restore_by_torch(merged, undo)), bits(W))
    # Strong updates make many entries differ, whose patch is deflated.
    assert isinstance(undo.patch, Blob) == (size >= 1e-3)


def test_rows_without_an_update_and_ranges_that_do_not_begin_at_0(monkeypatch):
    monkeypatch.setattr(block_operations, "BLOCK", 600)
    W, plan = case(ml_dtypes.bfloat16, (12, 48))
    (slab,) = plan.slabs
    tall = np.concatenate([W, W, W])
    plan = TensorPlan("a.weight", LazyArray.of(tall), tall.shape, (Slab("a", 12, 24, slab.terms),))
    merged, undo = merge_by_torch(tall, plan, TASK)
    assert np.array_equal(bits(merged), bits(as_merged(plan)))
    assert np.array_equal(bits(merged[:12]), bits(W))
    assert not np.array_equal(bits(merged[12:24]), bits(W))
    assert np.array_equal(bits(restore_by_torch(merged, undo)), bits(tall))


def test_a_program_may_ask_for_fast_products_in_the_meantime():
    W, plan = case(ml_dtypes.bfloat16, (256, 256))
    before = torch.get_float32_matmul_precision()
    try:
        merged, undo = merge_by_torch(W, plan, TASK)
        torch.set_float32_matmul_precision("medium")
        assert not block_operations._torch_keeps_float32()
        again, same = merge_by_torch(W, plan, TASK)
        assert np.array_equal(bits(again), bits(merged))
        assert same.patch.nbytes == undo.patch.nbytes
        assert np.array_equal(bits(restore_by_torch(merged, undo)), bits(W))
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_needs_the_general_way_is_left_to_it():
    W, plan = case(np.float64)
    assert merge_by_torch(W, plan, TASK) is None
    W, plan = case(np.float16)
    other = TensorPlan(plan.key, plan.base, plan.matrix, plan.slabs, replacement=LazyArray.of(W))
    assert merge_by_torch(W, other, TASK) is None
