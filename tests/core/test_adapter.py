"""Adapter: a mapping in natural order that keeps everything its file held."""

import copy

import numpy as np
import pytest

from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank, Scaling
from loralens.errors import OptionError

NAMES = ["layers.2.q_proj", "layers.2.v_proj", "layers.10.q_proj", "lm_head"]


def module(rank=2):
    return LowRank(np.ones((5, rank), np.float32), np.ones((rank, 3), np.float32))


def adapter(**fields):
    return Adapter(modules={name: module() for name in reversed(NAMES)}, **fields)


def test_modules_come_in_natural_order():
    assert list(adapter()) == list(adapter().modules) == [name for name, _ in adapter().items()] == NAMES


def test_it_is_a_mapping():
    one = adapter()
    assert len(one) == 4
    assert "lm_head" in one
    assert "q_proj" not in one
    assert 3 not in one
    assert one["lm_head"] is one.modules["lm_head"]
    assert dict(one.items()) == dict(one.modules)
    assert not list(Adapter(modules={}))


def test_it_is_a_copy_that_nobody_can_change():
    modules, extra = {"q": module()}, {}
    one = Adapter(modules=modules, extra=extra)
    modules["v"], extra["x"] = module(), None
    assert (list(one), dict(one.extra)) == (["q"], {})
    for mapping in (one.modules, one.extra):
        with pytest.raises(TypeError):
            mapping["v"] = None
    with pytest.raises(AttributeError):
        one.modules = {}
    with pytest.raises(TypeError):
        one["v"] = module()


@pytest.mark.parametrize("name", ["layers.2.k_proj", "q_prj", "", "layers.2.q_proj.weight"])
def test_an_unknown_name_names_the_nearest(name):
    with pytest.raises(OptionError) as caught:
        adapter()[name]
    what, fix = str(caught.value).splitlines()
    assert what == f"no module {name!r}"
    assert fix.startswith("  fix: the nearest names are ")
    if name == "layers.2.k_proj":
        assert "layers.2.q_proj" in fix
        assert "layers.2.v_proj" in fix


def test_an_unknown_name_in_an_empty_adapter():
    with pytest.raises(OptionError, match="there are no modules"):
        Adapter(modules={})["q"]


def test_map_changes_modules_and_nothing_else():
    extra = {"head": Extra("saved", "head", LazyArray.of(np.ones(2)))}
    finding = Finding("note", "code", "text")
    one = adapter(extra=extra, config={"r": 2}, metadata={"a": "b"}, format="x", base_model="y", findings=(finding,))
    before = one.modules
    halved = one.map(lambda m: m.rescaled(m.scale / 2, Scaling()))
    assert [m.scale for m in halved.modules.values()] == [0.5] * 4
    assert [m.scale for m in one.modules.values()] == [1.0] * 4
    assert list(halved) == NAMES
    for name in ("extra", "config", "metadata", "format", "base_model", "findings"):
        assert getattr(halved, name) == getattr(one, name)
    assert one.modules is before


def test_what_belongs_to_a_module_is_renamed_with_it():
    tensor = LazyArray.of(np.ones(2))
    extra = {
        "base_model.model.model.q.lora_magnitude_vector": Extra("magnitude", "model.q", tensor),
        "base_model.model.head.weight": Extra("saved", "head", tensor),
        "lora_te_x.dora_scale": Extra("magnitude", "lora_te_x", tensor),
        "elsewhere": Extra("bias", "model.q", tensor, "bias"),
    }
    one = Adapter(modules={"model.q": module(), "lora_te_x": module()}, extra=extra)
    two = one.renamed({"model.q": "q", "lora_te_x": "x"})
    assert list(two) == ["q", "x"]
    assert {key: part.module for key, part in two.extra.items()} == {
        "base_model.model.q.lora_magnitude_vector": "q",
        "base_model.model.head.weight": "head",
        "x.dora_scale": "x",
        "elsewhere": "q",
    }


def test_two_things_of_one_name_are_refused():
    one = Adapter(modules={"a.q": module(), "b.q": module()})
    with pytest.raises(OptionError, match="two modules would have the name q"):
        one.renamed({"a.q": "q", "b.q": "q"})
    tensor = LazyArray.of(np.ones(2))
    extra = {"a.q.bias": Extra("bias", "a.q", tensor, "bias"), "q.bias": Extra("bias", "q", tensor, "bias")}
    with pytest.raises(OptionError, match=r"two tensors would have the name q\.bias"):
        Adapter(modules={"a.q": module()}, extra=extra).renamed({"a.q": "q"})


def test_load_holds_the_factors_in_memory():
    reads = []
    lazy = LazyArray(lambda: reads.append(1) or np.ones((5, 2)), shape=(5, 2), dtype=float)
    held = Adapter(modules={"q": LowRank(lazy, np.ones((2, 3)))}).load()
    assert held["q"].B is held["q"].B
    assert reads == [1]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([], "Adapter(peft, 0 modules, rank none, 0 parameters)"),
        ([2], "Adapter(peft, 1 modules, rank 2, 16 parameters)"),
        ([4, 2, 300], "Adapter(peft, 3 modules, rank 2–300, 2,448 parameters)"),
    ],
)
def test_what_it_says_of_itself(ranks, words):
    one = Adapter(modules={str(r): module(r) for r in ranks})
    assert repr(one) == words
    assert one.parameters == sum(8 * r for r in ranks)
    assert one.nbytes == 4 * one.parameters


def test_a_finding_as_a_record():
    finding = Finding("warning", "code", "text")
    assert finding.record() == {"level": "warning", "code": "code", "text": "text", "fix": ""}


def test_a_shallow_copy_is_equal():
    one = adapter(config={"r": 2})
    assert copy.copy(one) == one
