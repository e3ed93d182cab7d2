"""One resident model, many tasks: the bits of a merge, and of the base after any number of switches."""

from copy import deepcopy
from dataclasses import replace
from hashlib import sha256

import ml_dtypes
import numpy as np
import pytest

from loralens import Adapter, LowRank, MismatchError, OptionError
from loralens.core import Dense, Extra, Layout, LazyArray, Structured
from loralens.merging import Switchboard
from loralens.merging import switchboard as module
from tests import reference
from tests.draws import draw_factors
from tests.interrupts import stopped_at
from tests.merging.merged import merge_all

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, ml_dtypes.float8_e4m3fn]


def low_rank(rng, out, in_, *, rank=3, size=0.01, **layout):
    return LowRank(*draw_factors(rng, out, in_, rank, "f4"), size / 2, layout=Layout(**layout))


def model(dtype, seed=0):
    """Two linear layers, a convolution, an embedding, two experts, and a norm that nobody touches."""
    rng = np.random.default_rng(seed)
    shapes = {
        "a.q.weight": (24, 16),
        "a.v.weight": (16, 16),
        "conv.weight": (6, 4, 3, 3),
        "embed.weight": (12, 8),
        "experts.up": (2, 10, 8),
        "norm.weight": (16,),
    }
    arrays = {key: (0.05 * rng.standard_normal(shape)).astype(dtype) for key, shape in shapes.items()}
    arrays["a.q.weight"].reshape(-1)[:5] = np.array([np.nan, -0.0, 1e-40, 0.0, 448], np.float32).astype(dtype)
    if np.dtype(dtype).itemsize > 1:
        arrays["a.v.weight"][0, :2] = np.array([np.inf, -np.inf]).astype(dtype)
    return arrays


def adapters():
    """Three tasks that share some weights and not others."""
    rng = np.random.default_rng(1)
    a = {
        "a.q": low_rank(rng, 24, 16),
        "conv": low_rank(rng, 6, 36, kind="conv", kernel=(3, 3)),
        "embed": low_rank(rng, 8, 12, kind="embedding"),
    }
    b = {"a.q": low_rank(rng, 24, 16, size=0.1), "a.v": low_rank(rng, 16, 16)}
    c = {
        "a.v": Structured(Dense(LazyArray.of(0.01 * rng.standard_normal((16, 16)).astype(np.float32)))),
        **{f"experts.up[{e}]": low_rank(rng, 10, 8, kind="experts") for e in range(2)},
    }
    return {name: Adapter(modules=modules) for name, modules in {"a": a, "b": b, "c": c}.items()}


def bits(arrays):
    return {key: sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for key, array in arrays.items()}


def as_merged(base, tasks, task):
    """What `loralens merge` writes."""
    found = {key: array.copy() for key, array in base.items()}
    if task:
        lazy = {key: LazyArray.of(array) for key, array in base.items()}
        found |= merge_all([(tasks[name], weight) for name, weight in task.items()], lazy)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_task_has_the_bits_of_a_merge_and_the_base_comes_back(dtype):
    base, tasks = model(dtype), adapters()
    live = {key: array.copy() for key, array in base.items()}
    board = Switchboard(live, tasks)
    assert not board.state.task
    for task in ({"a": 1.0}, {"b": 1.0}, {"a": 0.7, "b": -0.3}, {"a": 1.0, "b": 1.0, "c": 0.5}, {"c": 1.0}, {}):
        board.switch(task)
        assert board.state.is_complete
        assert board.state.task == task
        assert bits(live) == bits(as_merged(base, tasks, task)), task
        board.verify()
    assert bits(live) == bits(base)


@pytest.mark.slow
def test_stopped_at_any_line_it_can_be_named_and_repaired():
    base, tasks = model(np.float16), adapters()
    wanted, of_a = (bits(as_merged(base, tasks, task)) for task in ({"a": 0.5, "b": 1.0}, {"a": 1.0}))
    live = {key: array.copy() for key, array in base.items()}
    begun = Switchboard(live, tasks)
    begun.switch("a")
    seen = set()
    for line in range(1, 10_000):
        # The arrays and what switches them are copied together: to begin anew takes longer.
        stopped, board = deepcopy((live, begun))
        if not stopped_at(line, lambda board=board: board.switch({"a": 0.5, "b": 1.0}), {module.__file__}):
            break
        state = board.state
        if not state.is_complete:
            assert state.task == {"a": 0.5, "b": 1.0}
            seen.add(len(state.waiting))
            with pytest.raises(MismatchError, match=r"repair\(\)"):
                board.verify()
        repaired, board_again = deepcopy((stopped, board))
        goal = dict(state.task)
        board_again.repair()
        assert bits(repaired) == (wanted if "b" in goal else of_a)
        board_again.verify()
        board_again.switch(None)
        assert bits(repaired) == bits(base)
        # Without a repair too.
        board.switch(None)
        assert bits(stopped) == bits(base)
    assert seen == {1, 2, 3, 4}
    assert line > 50


def test_verify_sees_that_somebody_else_changed_a_weight():
    live = model(np.float16)
    board = Switchboard(live, adapters())
    board.switch("a")
    live["a.q.weight"][10, 10] += 1
    with pytest.raises(MismatchError, match=r"1 weights were changed by something else: a\.q\.weight"):
        board.verify()


def dora(rng):
    modules = {"a.q": low_rank(rng, 24, 16)}
    lengths = LazyArray.of((1 + 0.1 * rng.random(24)).astype(np.float32))
    return Adapter(modules=modules, extra={"m": Extra("magnitude", "a.q", lengths)})


def finite(dtype):
    live = model(dtype)
    return {
        key: np.nan_to_num(array.astype(np.float32), posinf=1, neginf=-1).astype(dtype) for key, array in live.items()
    }


def test_dora_is_merged_alone_and_refused_in_a_mix():
    base, rng = finite(np.float32), np.random.default_rng(3)
    live = {key: array.copy() for key, array in base.items()}
    tasks = {"d": dora(rng), **adapters()}
    board = Switchboard(live, tasks)
    board.switch("d")
    lengths = tasks["d"].extra["m"].tensor.read()
    expected = reference.dora(base["a.q.weight"].astype(np.float64), tasks["d"]["a.q"].dense(), lengths)
    np.testing.assert_allclose(live["a.q.weight"], expected, rtol=1e-5, atol=1e-7)
    board.switch("b")
    with pytest.raises(MismatchError, match="DoRA"):
        board.switch({"d": 1, "b": 1})
    assert board.state.task == {"b": 1.0}
    assert board.state.is_complete
    board.switch(None)
    assert bits(live) == bits(base)


def test_saved_modules_and_biases_are_swapped_in_place():
    base = finite(ml_dtypes.bfloat16)
    live = {key: array.copy() for key, array in base.items()}
    rng = np.random.default_rng(4)
    norm = LazyArray.of(rng.standard_normal(16).astype(np.float32))
    tasks = {name: replace(adapter, extra={"n": Extra("saved", "norm", norm)}) for name, adapter in adapters().items()}
    board = Switchboard(live, tasks)
    board.switch("a")
    np.testing.assert_array_equal(live["norm.weight"], norm.read().astype(ml_dtypes.bfloat16))
    assert board.bytes().copies == 32
    with pytest.raises(MismatchError, match=r"replacement for norm\.weight"):
        board.switch({"a": 1, "b": 1})
    board.switch(None)
    assert bits(live) == bits(base)


def test_what_has_no_place_is_refused_by_name():
    tasks, rng = adapters(), np.random.default_rng(5)
    head = Extra("saved", "head", LazyArray.of(rng.standard_normal((2, 16)).astype(np.float32)))
    with pytest.raises(MismatchError, match=r"a: it brings head\.weight, which the model does not have"):
        Switchboard(model(np.float32), {"a": replace(tasks["a"], extra={"h": head})})
    bigger = Extra("embedding", "embed", LazyArray.of(rng.standard_normal((13, 8)).astype(np.float32)))
    with pytest.raises(MismatchError, match=r"embed\.weight would change its shape from \(12, 8\) to \(13, 8\)"):
        Switchboard(model(np.float32), {"b": replace(tasks["b"], extra={"e": bigger})})
    shared = model(np.float32)
    shared["copy.weight"] = shared["a.q.weight"]
    with pytest.raises(MismatchError, match=r"a\.q\.weight shares its numbers with copy\.weight"):
        Switchboard(shared, tasks)
    with pytest.raises(OptionError, match="int is not a model"):
        Switchboard(3, tasks)


def test_an_embedding_takes_its_head_along_only_where_that_is_meant():
    live = model(np.float32)
    live["lm_head.weight"] = live["embed.weight"]
    task = adapters()["a"]
    with pytest.raises(MismatchError, match=r"embed\.weight shares its numbers with lm_head\.weight") as error:
        Switchboard(live, {"a": task})  # unmerged, it leaves the head as it is
    assert "keep_tied=True" in error.value.fix
    said = ("a: lm_head.weight shares the numbers of embed.weight and changes with it",)
    assert Switchboard(live, {"a": task}, keep_tied=True).notes == said


def tiny(dtype):
    torch = pytest.importorskip("torch")
    from tests.models import llama

    return llama().to(getattr(torch, dtype)), torch


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_torch_model_changes_in_place(dtype):
    from tests.models import adapter as random_adapter

    net, torch = tiny(dtype)
    tasks = {name: random_adapter(net, ("q_proj", "down_proj"), seed=i) for i, name in enumerate(("a", "b"))}
    before = {key: value.clone() for key, value in net.state_dict().items()}
    where = {key: value.data_ptr() for key, value in net.named_parameters()}
    ids = torch.arange(8)[None]
    with torch.no_grad():
        plain = net(ids).logits
        board = Switchboard(net, tasks)
        board.switch({"a": 1.0, "b": 0.5})
        adapted = net(ids).logits
    assert {key: value.data_ptr() for key, value in net.named_parameters()} == where
    assert (adapted - plain).abs().max() > 1e-3
    for name in tasks["a"]:
        D = tasks["a"][name].dense() + 0.5 * tasks["b"][name].dense()
        exact = before[f"{name}.weight"].double() + torch.from_numpy(D)
        got = net.get_submodule(name).weight.double()
        unit = torch.finfo(getattr(torch, dtype)).eps
        assert ((got - exact).abs() <= 0.502 * unit * exact.abs() + 1e-7).all()
    board.switch("b")
    board.switch(None)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])


def test_weights_that_are_stored_otherwise_or_have_gone():
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(16, 24, bias=False)
    layer.weight = torch.nn.Parameter(torch.randn(16, 24).to(torch.bfloat16).t())  # not contiguous
    net = torch.nn.ModuleDict({"q": layer})
    before = layer.weight.detach().clone()
    rng = np.random.default_rng(6)
    board = Switchboard(net, {"a": Adapter(modules={"q": low_rank(rng, 24, 16)})})
    board.switch("a")
    assert not layer.weight.is_contiguous()
    assert not torch.equal(layer.weight, before)
    board.switch(None)
    assert torch.equal(layer.weight, before)
    net.float()
    with pytest.raises(MismatchError, match=r"q\.weight was bfloat16 \(24, 16\) and is float32"):
        board.switch("a")


@pytest.mark.gpu
def test_on_a_gpu_weights_are_copied_over_and_back():
    from tests.models import adapter as random_adapter

    net, torch = tiny("bfloat16")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    task = random_adapter(net, ("q_proj",))
    there, _ = tiny("bfloat16")
    there.to("cuda")
    before = {key: value.clone() for key, value in there.state_dict().items()}
    Switchboard(net, {"a": task}).switch("a")
    board = Switchboard(there, {"a": task})
    board.switch("a")
    for key, value in there.state_dict().items():
        assert torch.equal(value.cpu(), net.state_dict()[key])
    board.switch(None)
    assert all(torch.equal(value, before[key]) for key, value in there.state_dict().items())
