"""Modules of stored models under the names that transformers 5 has in memory."""

import numpy as np
import pytest

import loralens
from loralens.core import Extra, LazyArray
from loralens.core.matching import slots
from loralens.formats.models.transformers_names import use_memory_names
from tests.models import low_rank as pair

VIT = "vit.encoder.layer.1"
MOE = "model.layers.0.block_sparse_moe"


def adapter(**modules):
    return loralens.Adapter(modules=modules, format="peft")


@pytest.mark.parametrize(
    ("kind", "stored", "held"),
    [
        ("vit", f"{VIT}.attention.attention.query", "vit.layers.1.attention.q_proj"),
        ("deit", f"{VIT}.attention.output.dense", "vit.layers.1.attention.o_proj"),
        ("vit", f"{VIT}.output.dense", "vit.layers.1.mlp.fc2"),
        ("bert", "encoder.layer.1.output.dense", "encoder.layer.1.output.dense"),
        ("dinov2", "encoder.layer.1.attention.attention.key", "encoder.layer.1.attention.k_proj"),
        ("llava", "language_model.model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        ("gemma3", "vision_tower.encoder.layers.0.mlp.fc1", "model.vision_tower.encoder.layers.0.mlp.fc1"),
        ("qwen2_vl", "model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        ("qwen2_vl", "visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
        ("phimoe", f"{MOE}.gate", "model.layers.0.mlp.router"),
        ("granitemoe", f"{MOE}.input_linear[1]", f"{MOE}.experts.gate_up_proj[1]"),
        ("granitemoe", f"{MOE}.router.layer", f"{MOE}.router"),
        ("mixtral", f"{MOE}.experts.1.w1", f"{MOE}.experts.1.w1"),  # PEFT joins these
        ("llama", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
    ],
)
def test_a_stored_name_becomes_that_of_memory(kind, stored, held):
    assert list(use_memory_names(adapter(**{stored: pair(4, 4)}), {"model_type": kind})) == [held]
    assert list(use_memory_names(adapter(**{held: pair(4, 4)}), {"model_type": kind})) == [held]
    assert slots(stored) == slots(held)


def test_what_belongs_to_a_module_goes_along():
    bias = Extra("bias", f"{VIT}.attention.attention.query", LazyArray.of(np.zeros(4, np.float32)), "bias")
    norm = Extra("saved", f"{VIT}.layernorm_before", LazyArray.of(np.zeros(4, np.float32)), "weight")
    source = loralens.Adapter(
        modules={f"{VIT}.attention.attention.query": pair(4, 4)},
        extra={f"x.{VIT}.attention.attention.query.bias": bias, f"x.{VIT}.layernorm_before.weight": norm},
        format="peft",
        config={"modules_to_save": [f"{VIT}.layernorm_before"]},
    )
    found = use_memory_names(source, {"model_type": "vit"})
    assert [extra.module for extra in found.extra.values()] == [
        "vit.layers.1.attention.q_proj", "vit.layers.1.layernorm_before"
    ]  # fmt: skip
    assert list(found.extra) == ["x.vit.layers.1.attention.q_proj.bias", "x.vit.layers.1.layernorm_before.weight"]
    assert found.config == {"modules_to_save": ["vit.layers.1.layernorm_before"]}


def test_dinov2_s_one_matrix_is_two_modules():
    both = pair(6, 4)
    found = use_memory_names(adapter(**{"encoder.layer.0.mlp.weights_in": both}), {"model_type": "dinov2"})
    assert list(found) == ["encoder.layer.0.mlp.gate_proj", "encoder.layer.0.mlp.up_proj"]
    np.testing.assert_allclose(np.vstack([module.dense() for module in found.modules.values()]), both.dense())


def test_single_experts_that_peft_does_not_join_are_joined_exactly():
    path = "model.layers.0.feed_forward.experts"
    single = {
        f"{path}.0.gate_proj": pair(3, 4, seed=1),
        f"{path}.0.up_proj": pair(3, 4, rank=1, seed=2, scale=2.0),
        f"{path}.2.up_proj": pair(3, 4, seed=3),
        f"{path}.2.down_proj": pair(4, 3, seed=4),
        "model.layers.0.feed_forward.router": pair(4, 4),
    }
    found = use_memory_names(adapter(**single), {"model_type": "jamba", "num_experts": 4})
    stacks = {f"{path}.{part}_proj[{e}]" for part in ("gate_up", "down") for e in range(4)}
    assert set(found) == {*stacks, "model.layers.0.feed_forward.router"}
    assert len({module.rank for name, module in found.items() if "gate_up" in name}) == 1
    first = np.vstack([single[f"{path}.0.{part}_proj"].dense() for part in ("gate", "up")])
    np.testing.assert_allclose(found[f"{path}.gate_up_proj[0]"].dense(), first, rtol=1e-6, atol=1e-7)
    third = np.vstack([np.zeros((3, 4)), single[f"{path}.2.up_proj"].dense()])
    np.testing.assert_allclose(found[f"{path}.gate_up_proj[2]"].dense(), third, rtol=1e-6, atol=1e-7)
    assert not found[f"{path}.gate_up_proj[1]"].dense().any()
    np.testing.assert_allclose(found[f"{path}.down_proj[2]"].dense(), single[f"{path}.2.down_proj"].dense(), rtol=1e-6)
