"""Experts of PEFT's stacks in GGUF and mlx-lm: gate and up apart, under the names of the other software."""

import json
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens import OptionError
from loralens.core import Layout
from loralens.formats import encode_adapter
from loralens.formats.dialects.expert_layouts import MLX, split_stacks
from loralens.formats.dialects.gguf_architectures import ARCHITECTURES
from tests.models import low_rank

MOE = "model.layers.0.mlp"
D, F, E = 6, 4, 3
PARTS = {"gate": 1, "down": 2, "up": 3}  # part of an expert → its number in Mixtral's checkpoints


def pair(out, in_, seed=0, kind="experts", **layout):
    return low_rank(out, in_, scale=0.5, seed=seed, layout=Layout(kind, **layout))


def adapter(path=MOE, *, d=D, f=F, turned=False, parts=("gate_up_proj", "down_proj"), **layout):
    shapes = {"gate_up_proj": (2 * f, d), "down_proj": (d, f)}
    modules = {
        f"{path}.experts.{part}[{e}]": pair(*(shapes[part][::-1] if turned else shapes[part]), seed=e, **layout)
        for part in parts
        for e in range(E)
    }
    return loralens.Adapter(modules=modules, format="peft")


def halves(module, *, turned=False, alternate=False):
    D = module.dense().T if turned else module.dense()
    return (D[::2], D[1::2]) if alternate else np.split(D, 2)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("turned", [False, True])
def test_gate_and_up_are_their_rows_of_b_and_share_a(kind, turned):
    source = adapter(turned=turned)
    apart = split_stacks(source, {"model_type": kind, "hidden_size": D})
    assert len(apart) == 3 * E
    for e in range(E):
        both = source[f"{MOE}.experts.gate_up_proj[{e}]"]
        wanted = halves(both, turned=turned, alternate=kind == "gpt_oss")
        for part, half in zip(("gate_proj", "up_proj"), wanted, strict=True):
            np.testing.assert_allclose(apart[f"{MOE}.experts.{part}[{e}]"].dense(), half, rtol=1e-6)
        down = source[f"{MOE}.experts.down_proj[{e}]"].dense()
        np.testing.assert_allclose(apart[f"{MOE}.experts.down_proj[{e}]"].dense(), down.T if turned else down)


def test_square_stacks_follow_the_others_or_the_version_of_peft():
    """gate and up together are as many rows as there are inputs."""
    square = {"d": 6, "f": 3}
    config = {"model_type": "olmoe", "hidden_size": 6}
    for turned in (False, True):
        assert split_stacks(adapter(turned=turned, **square), config)[f"{MOE}.experts.down_proj[0]"].shape == (6, 3)
        one = adapter(turned=turned, parts=("gate_up_proj",), transposed=turned, **square)
        found = split_stacks(one, config)[f"{MOE}.experts.up_proj[1]"].dense()
        np.testing.assert_allclose(found, halves(one[f"{MOE}.experts.gate_up_proj[1]"], turned=turned)[1], rtol=1e-6)


@pytest.mark.parametrize(("kind", "arch"), [("qwen3_moe", "qwen3moe"), ("gpt_oss", "gpt-oss")])
@pytest.mark.parametrize("turned", [False, True])
def test_stacks_are_equal_to_their_gguf_file(kind, arch, turned, tmp_path: Path):
    source = adapter(turned=turned, transposed=turned)
    config = {"model_type": kind, "hidden_size": D}
    loralens.save(source, tmp_path / "a.gguf", format="gguf", base_config=config)
    for pair_of in ((source, tmp_path / "a.gguf"), (tmp_path / "a.gguf", source)):
        result = loralens.equal(*pair_of)
        assert result.equal, result
        assert len(result.differences) == 3 * E
    changed = source.map(lambda module: module.rescaled(module.scale * 2, module.scaling))
    assert not loralens.equal(changed, tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("kind", "path", "stack"),
    [
        ("mixtral", "model.layers.0.mlp", "model.layers.0.block_sparse_moe.switch_mlp"),
        ("granitemoe", "model.layers.0.block_sparse_moe", "model.layers.0.block_sparse_moe.switch_mlp"),
        ("jamba", "model.layers.0.feed_forward", "model.layers.0.feed_forward.switch_mlp"),
        ("gpt_oss", "model.layers.0.mlp", "model.layers.0.mlp.experts"),
    ],
)
def test_the_names_of_mlx(kind, path, stack, tmp_path: Path):
    source = adapter(path)
    config = {"model_type": kind, "hidden_size": D}
    loralens.save(source, tmp_path / "mlx", format="mlx", base_config=config)
    back = loralens.load(tmp_path / "mlx")
    assert set(back) == {f"{stack}.{part}_proj[{e}]" for part in ("gate", "up", "down") for e in range(E)}
    wanted = halves(source[f"{path}.experts.gate_up_proj[2]"], alternate=kind == "gpt_oss")
    np.testing.assert_allclose(back[f"{stack}.up_proj[2]"].dense(), wanted[1], rtol=1e-6)
    said = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    tail = stack.removeprefix("model.layers.0.")
    assert said["lora_parameters"]["keys"] == [f"{tail}.{part}_proj" for part in ("down", "gate", "up")]


@pytest.mark.parametrize("alone", ["model.layers.0.block_sparse_moe.experts.{}.w3", f"{MOE}.experts.{{}}.up_proj"])
def test_single_experts_become_a_stack_of_mlx_and_come_back(alone, tmp_path: Path):
    modules = {alone.format(e): pair(F, D, seed=e, kind="linear") for e in range(E)}
    modules[f"{MOE}.gate"] = pair(E, D, kind="linear")
    source = loralens.Adapter(modules=modules, format="peft")
    kind = "mixtral" if "w3" in alone else "qwen3_moe"
    loralens.save(source, tmp_path / "mlx", format="mlx", base_config={"model_type": kind})
    back = loralens.load(tmp_path / "mlx")
    owner = "model.layers.0.block_sparse_moe" if kind == "mixtral" else MOE
    assert set(back) == {f"{owner}.gate", *(f"{owner}.switch_mlp.up_proj[{e}]" for e in range(E))}
    loralens.save(back, tmp_path / "peft", format="peft")
    again = loralens.load(tmp_path / "peft")
    assert set(again) == {f"{owner}.gate", *(alone.format(e) for e in range(E))}
    for e in range(E):
        np.testing.assert_allclose(again[alone.format(e)].dense(), modules[alone.format(e)].dense(), rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "alone"),
    [
        ("MixtralForCausalLM", {p: f"model.layers.0.block_sparse_moe.experts.{{}}.w{i}" for p, i in PARTS.items()}),
        ("Qwen3MoeForCausalLM", {part: f"{MOE}.experts.{{}}.{part}_proj" for part in PARTS}),
    ],
)
@pytest.mark.parametrize("changed", [False, True])
def test_stacks_of_llama_cpp_become_single_experts_of_peft(kind, alone, changed, tmp_path: Path):
    """PEFT drops ``experts.gate_proj[0]`` without a word, because no module has this name."""
    found = next(arch for arch in ARCHITECTURES if kind in arch.classes)
    config = {"architectures": [kind], "model_type": next(t for t in found.types if t in MLX), "hidden_size": D}
    config |= {"num_attention_heads": 2, "num_local_experts": E}
    source = adapter()
    loralens.save(source, tmp_path / "a.gguf", format="gguf", base_config=config)
    back = loralens.load(tmp_path / "a.gguf")
    if changed:
        back = back.map(lambda module: module.without_origin())
    loralens.save(back, tmp_path / "peft", format="peft")
    again = loralens.load(tmp_path / "peft")
    assert set(again) == {name.format(e) for name in alone.values() for e in range(E)}
    for e in range(E):
        gate, up = halves(source[f"{MOE}.experts.gate_up_proj[{e}]"])
        down = source[f"{MOE}.experts.down_proj[{e}]"].dense()
        for part, wanted in {"gate": gate, "up": up, "down": down}.items():
            np.testing.assert_allclose(again[alone[part].format(e)].dense(), wanted, rtol=1e-6)


def test_what_nothing_says_is_asked_for():
    with pytest.raises(OptionError, match="does not say which model") as caught:
        encode_adapter(adapter(), "mlx")
    assert "--base" in caught.value.fix
    with pytest.raises(OptionError, match="of 'xyz' is not known here"):
        encode_adapter(adapter(), "mlx", base_config={"model_type": "xyz"})
    with pytest.raises(OptionError, match="say which model this is"):
        encode_adapter(adapter(), "gguf")
