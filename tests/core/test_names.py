"""Module names: order, block, kind, globs and near misses."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralens.core.names import (
    Block,
    block,
    is_expert_alone,
    kind,
    kind_in_block,
    natural_key,
    nearest,
)
from tests.core.test_selection import NAMES

ORDERED = [
    "",
    "0",
    "01",
    "1",
    "9",
    "10",
    "10.a",
    "a",
    "a0",
    "a2b",
    "a10b",
    "a.b",
    "ab",
    "layers.2.mlp.experts.down_proj[3]",
    "layers.2.mlp.experts.down_proj[10]",
    "layers.2.self_attn.q_proj",
    "layers.10.self_attn.q_proj",
    f"layers.{'1' * 5000}.q",
    "layers.x",
]


def test_numbers_count_as_numbers():
    shuffled = ORDERED[:]
    random.Random(0).shuffle(shuffled)
    assert sorted(shuffled, key=natural_key) == ORDERED


@given(st.integers(0, 10**30), st.integers(0, 10**30))
def test_any_two_numbers(i, j):
    assert natural_key(f"x.{i}.y") != natural_key(f"x.0{i}.y")
    assert (natural_key(f"x.{i}.y") < natural_key(f"x.{j}.y")) == (i < j)


@pytest.mark.parametrize(
    ("name", "expected_block", "expected_kind"),
    [
        ("model.layers.11.self_attn.q_proj", Block("model.layers", 11), "q_proj"),
        ("transformer.h.0.attn.c_attn", Block("transformer.h", 0), "c_attn"),
        ("0.q", Block("", 0), "q"),
        ("model.layers.0.mlp.experts.gate_up_proj[3]", Block("model.layers", 0), "gate_up_proj"),
        ("model.layers.0.experts.7.w1", Block("model.layers", 0), "w1"),
        ("unet.down_blocks.1.attentions.0.to_out.0", Block("unet.down_blocks", 1), "to_out.0"),
        ("a.net.0.1", Block("a.net", 0), "net.0.1"),
        ("lm_head", None, "lm_head"),
        ("conv1.q2", None, "q2"),
        ("layers.²", None, "²"),
        (f"layers.{'1' * 5000}.q", None, "q"),
        ("", None, ""),
        ("3", Block("", 3), "3"),
    ],
)
def test_block_and_kind(name, expected_block, expected_kind):
    assert block(name) == expected_block
    assert kind(name) == expected_kind


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["model.layers.11.self_attn.q_proj", "lora_te_text_model_encoder_layers_11_self_attn_q_proj"],
            "self_attn_q_proj",
        ),
        (
            [
                "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
                "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
                "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
            ],
            "attn1_to_out_0",
        ),
        (["blocks.0.ff.net.2", "lora_unet_blocks_0_ff_net_2"], "ff_net_2"),
        (["model.layers.0.mlp.experts.gate_up_proj[3]"], "mlp_experts_gate_up_proj"),
        (["w_018", "w.018"], "w"),
        (["lm_head"], "lm_head"),
        (["3"], "3"),
        ([""], ""),
    ],
)
def test_the_kind_in_a_block_is_the_same_in_every_dialect(names, expected):
    assert {kind_in_block(name) for name in names} == {expected}


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("model.layers.0.block_sparse_moe.experts.7.w1", True),
        ("experts.0.up_proj", True),
        ("model.layers.0.mlp.experts.gate_up_proj[3]", False),
        ("model.layers.0.mlp.shared_experts.0.up_proj", False),
        ("model.layers.0.mlp.experts.down_proj", False),
    ],
)
def test_experts_that_are_modules_of_their_own(name, alone):
    assert is_expert_alone(name) is alone


def test_nearest():
    assert nearest("q_prj", NAMES).startswith("q_proj")
    assert nearest("model.layers.1.self_attn.k_proj", NAMES, count=1) == "model.layers.1.self_attn.v_proj"
    assert nearest("x", []) == "none: there are no modules"
    assert nearest("q_prj", iter(NAMES)) == nearest("q_prj", NAMES)


@pytest.mark.parametrize(
    ("name", "stack", "number", "last"),
    [
        ("lora_unet_up_blocks_1_attentions_2_attn1_to_v", "lora_unet_up_blocks", 1, "attn1_to_v"),
        ("lora_unet_down_blocks_0_attn1_to_out_0", "lora_unet_down_blocks", 0, "attn1_to_out_0"),
        ("w_018", "w", 18, "w"),
        ("unet.139", "unet", 139, "unet"),
        ("unet.down_blocks.0.attn1.to_out.0", "unet.down_blocks", 0, "to_out.0"),
    ],
)
def test_names_that_are_numbered_in_other_ways(name, stack, number, last):
    assert block(name) == (stack, number)
    assert kind(name) == last
