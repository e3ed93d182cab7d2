"""Adapter: a mapping in natural order that keeps everything its file held."""

import numpy as np
import pytest

from loralens import Adapter, LowRank, OptionError
from loralens.core import Extra, LazyArray

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
