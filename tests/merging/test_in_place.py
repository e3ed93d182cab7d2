"""Parameters of torch that are changed in their own memory: stopped at any line, they can be finished."""

from pathlib import Path

import numpy as np
import pytest

from loralens.core.adapter import Adapter
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank
from loralens.merging import Switchboard
from loralens.merging.apply import prepare_merge
from loralens.merging.plan import Slab, TensorPlan
from loralens.merging.resident import block_operations, in_place
from loralens.merging.resident.differences import EntryReader, code_entries, find_entries
from loralens.merging.undo.patch import bits
from tests.interrupts import Stop, stopped_at

torch = pytest.importorskip("torch")
FILES = {str(path) for path in Path(in_place.__file__).parent.glob("*.py")}


def network(dtype, seed=0):
    torch.manual_seed(seed)
    return torch.nn.ModuleDict({"a": torch.nn.Linear(40, 11, bias=False), "b": torch.nn.Linear(40, 7, bias=False)}).to(
        dtype
    )


def weak_adapter(size=3e-4):
    """An update so small that few entries of W differ from R."""
    rng = np.random.default_rng(0)
    factors = {
        name: (rng.standard_normal((rows, 3)), size * rng.standard_normal((3, 40))) for name, rows in ROWS.items()
    }
    return Adapter(modules={name: LowRank(B.astype("f4"), A.astype("f4"), 1.0) for name, (B, A) in factors.items()})


ROWS = {"a": 11, "b": 7}


def numbers(model):
    return {key: tensor.detach().view(torch.uint8).numpy().tobytes() for key, tensor in model.state_dict().items()}


def merged_numbers(dtype, adapter):
    """What `loralens merge` writes."""
    from loralens.merging.resident.slots import slots_of

    found = {}
    for key, slot in slots_of(network(dtype)).items():
        W = slot.read()
        slab = Slab(key, 0, len(W), ((1.0, adapter[key.removesuffix(".weight")]),))
        blocks = prepare_merge(TensorPlan(key, LazyArray.of(W), W.shape, (slab,))).blocks()
        found[key] = np.concatenate([block.merged.copy() for block in blocks]).tobytes()
    return found


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("stride", "dtype"),
    [
        *((17, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
        pytest.param(1, torch.bfloat16, marks=pytest.mark.slow),
        # The lines are the same, and the numbers change in other places.
        *(pytest.param(5, dtype, marks=pytest.mark.slow) for dtype in (torch.float16, torch.float32)),
    ],
)
def test_stopped_at_any_line_of_a_merge_or_of_its_undoing(stride, dtype, monkeypatch):
    # Blocks of four rows, and so two shapes of blocks for each weight.
    monkeypatch.setattr(block_operations, "BLOCK", 4 * 40 * dtype.itemsize)
    adapter = weak_adapter()
    base, merged = numbers(network(dtype)), merged_numbers(dtype, adapter)
    assert base != merged
    other = Switchboard(network(dtype, seed=5), {"a": weak_adapter(1e-3)})
    for goal, before, after in (("a", base, merged), (None, merged, base)):
        for line in range(1, 10_000, stride):
            model = network(dtype)
            # Only the lines of this thread are stopped at.
            board = Switchboard(model, {"a": adapter}, threads=1)
            if goal is None:
                board.switch("a")
                assert all(isinstance(undo, in_place.RoundedMerge) for undo in board._merged.values())
            assert numbers(model) == before
            if not stopped_at(line, lambda board=board, goal=goal: board.switch(goal), FILES):
                break
            # Another switchboard works with blocks of the same shapes in the meantime.
            other.switch("a")
            other.switch(None)
            state = board.state
            board.repair()
            assert numbers(model) == (after if dict(state.task) == ({"a": 1.0} if goal else {}) else before)
            board.switch(None)
            assert numbers(model) == base
            board.verify()
        assert line > 100


def test_threads_and_memory_in_another_order_change_no_bit():
    adapter, found = weak_adapter(), []
    for options in ({}, {"threads": 2}):
        model = network(torch.bfloat16)
        if not options:
            # A parameter whose rows are not one behind the other cannot be changed in blocks of its own memory.
            model["a"].weight = torch.nn.Parameter(model["a"].weight.detach().t().contiguous().t())
        board = Switchboard(model, {"a": adapter}, **options)
        before = numbers_in_order(model)
        board.switch("a")
        found.append(numbers_in_order(model))
        board.switch(None)
        assert numbers_in_order(model) == before
    expected = merged_numbers(torch.bfloat16, adapter)
    assert found == [expected, expected]


def test_torch_has_its_threads_again_after_a_switch(monkeypatch):
    count = torch.get_num_threads()
    seen = []
    write = in_place.MergeInPlace.finish

    def finish(self):
        seen.append(torch.get_num_threads())
        if len(seen) == 2:
            raise Stop
        return write(self)

    monkeypatch.setattr(in_place.MergeInPlace, "finish", finish)
    try:
        torch.set_num_threads(3)
        model = network(torch.bfloat16)
        board, before = Switchboard(model, {"a": weak_adapter()}), numbers(model)
        with pytest.raises(Stop):
            board.switch("a")
        assert seen[:2] == [1, 1]
        assert torch.get_num_threads() == 3
        board.repair()
        assert numbers(model) == merged_numbers(torch.bfloat16, weak_adapter())
        board.switch(None)
        assert numbers(model) == before
    finally:
        torch.set_num_threads(count)


def numbers_in_order(model):
    return {
        key: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for key, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize(
    ("size", "step", "other"), [(5000, 300, 700), (513, 512, 1), (256, 256, 256), (70_000, 4097, 9)]
)
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_any_part_of_a_weight_can_be_corrected(size, step, other, dtype):
    rng = np.random.default_rng(size)
    w = rng.integers(0, 2**16, size).astype(dtype)
    r = w.copy()
    chosen = np.flatnonzero(rng.random(size) < 0.03)
    # Some differences are larger than a byte holds.
    r[chosen] += rng.integers(-200, 200, chosen.size).astype(dtype)
    entries = code_entries([find_entries(w[i : i + step], r[i : i + step], i) for i in range(0, size, step)], size)
    assert entries.numbers.size
    reader, places = EntryReader(entries), list(range(0, size, max(other, size // 300)))
    for first in rng.permutation(places):
        part = r[first : first + max(other, size // 300)]
        reader.correct(part, int(first))
    assert np.array_equal(bits(r), bits(w))
