"""What trainers change in PEFT's files: wrappers in names, files in several parts, values of the configuration."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from loralens import LoraLensError
from tests.conftest import small_adapter

LAYER = "model.layers.0.self_attn.q_proj"


def changed(small: Path, folder: Path, rename: tuple[str, str] = ("", ""), **fields: Any) -> Path:
    """A copy of an adapter with other names in its keys, and other fields in its configuration."""
    folder.mkdir()
    tensors = load_file(small / "adapter_model.safetensors")
    save_file({key.replace(*rename): tensor for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    config = json.loads((small / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return folder


@pytest.mark.parametrize(
    "rename",
    [
        (".self_attn.", "._fsdp_wrapped_module.self_attn."),
        ("q_proj.", "q_proj._checkpoint_wrapped_module."),
        ("base_model.model.", "_orig_mod.base_model.model."),
    ],
)
def test_wrappers_are_no_part_of_a_name(small: Path, rename: tuple[str, str], tmp_path: Path) -> None:
    adapter = loralens.load(changed(small, tmp_path / "wrapped", rename))
    assert set(adapter) == set(small_adapter())
    assert [finding.code for finding in adapter.findings] == ["trainer-names"]


def test_the_same_tensor_with_and_without_a_wrapper_is_refused(small: Path, tmp_path: Path) -> None:
    folder = changed(small, tmp_path / "twice")
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(iter(tensors))
    wrapped = key.replace("model.layers", "_fsdp_wrapped_module.model.layers")
    save_file({**tensors, wrapped: tensors[key]}, folder / "adapter_model.safetensors")
    with pytest.raises(LoraLensError, match="stored twice, with and without the wrapper"):
        loralens.load(folder)


def test_tinkers_head_has_the_usual_name(small: Path, tmp_path: Path) -> None:
    folder = changed(small, tmp_path / "tinker", (LAYER, "model.unembed_tokens"), target_modules="all-linear")
    assert "lm_head" in loralens.load(folder)


def test_an_adapter_in_several_files_is_read_by_its_index(small: Path, tmp_path: Path) -> None:
    folder = changed(small, tmp_path / "shards")
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    keys = sorted(tensors)
    parts = {f"adapter_model-0000{i + 1}-of-00002.safetensors": keys[i::2] for i in range(2)}
    for name, members in parts.items():
        save_file({key: tensors[key] for key in members}, folder / name)
    index = folder / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, each in parts.items() for key in each}}))
    for path in (folder, index):
        adapter = loralens.load(path)
        assert loralens.equal(adapter, loralens.load(small)).equal
    index.write_text(json.dumps({"weight_map": {"other": next(iter(parts))}}))
    with pytest.raises(LoraLensError, match="other is not in"):
        loralens.load(folder)
    for wrong in ({}, {"weight_map": {"a": "../outside.safetensors"}}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(LoraLensError, match="weight_map does not say"):
            loralens.load(folder)


def test_an_alpha_of_0_is_reported_and_can_be_replaced(small: Path, tmp_path: Path) -> None:
    folder = changed(small, tmp_path / "verl", lora_alpha=0, alpha_pattern={})
    adapter = loralens.load(folder)
    assert [finding.code for finding in adapter.findings] == ["alpha-zero"]
    assert adapter[LAYER].scale == 0
    with_alpha = loralens.load(folder, alpha=8)
    assert (with_alpha[LAYER].scale, with_alpha.findings) == (4.0, ())


@pytest.mark.parametrize("excluded", [["q_proj"], r".*\.q_proj"])
def test_excluded_modules_are_reported(small: Path, excluded: Any, tmp_path: Path) -> None:
    adapter = loralens.load(changed(small, tmp_path / "excluded", exclude_modules=excluded))
    (finding,) = adapter.findings
    assert finding.code == "module-excluded"
    assert f"3 modules (the first is {LAYER})" in finding.text
    assert np.count_nonzero(adapter[LAYER].B)


def test_tinkers_stacks_are_single_experts(small: Path, tmp_path: Path) -> None:
    """The factor at the side of the hidden states is shared by all experts."""
    rng, layer = np.random.default_rng(0), "model.layers.0.mlp.experts"
    stacks = {"w1": ((1, 2, 6), (3, 4, 2)), "w2": ((3, 2, 4), (1, 6, 2)), "w3": ((1, 2, 6), (3, 4, 2))}
    tensors = {
        f"base_model.model.{layer}.{part}.lora_{half}.weight": rng.standard_normal(shape).astype(np.float32)
        for part, shapes in stacks.items()
        for half, shape in zip("AB", shapes, strict=True)
    }
    folder = changed(small, tmp_path / "tinker", target_modules="all-linear", r=2, lora_alpha=4)
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter = loralens.load(folder)
    assert len(adapter) == 9
    for part, matrix in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        A, B = (tensors[f"base_model.model.{layer}.{part}.lora_{half}.weight"] for half in "AB")
        for i, delta in enumerate(2 * B @ A):
            np.testing.assert_allclose(adapter[f"{layer}.{i}.{matrix}"].dense(), delta, rtol=1e-6)
    loralens.convert(folder, to="peft", output=tmp_path / "peft")
    written = loralens.load(tmp_path / "peft")
    assert loralens.equal(adapter, written).equal
    assert not written.findings
    wrong = f"base_model.model.{layer}.w1.lora_B.weight"
    save_file({**tensors, wrong: np.ones((3, 4, 5), np.float32)}, folder / "adapter_model.safetensors")
    with pytest.raises(LoraLensError, match="not Tinker's experts"):
        loralens.load(folder)


@pytest.mark.parametrize(
    ("key", "software"),
    [
        ("decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight", "Megatron-Bridge and NeMo"),
        ("layers/0/attn/q_einsum/w_lora_a", "Qwix"),
    ],
)
def test_names_that_are_not_read_are_refused_by_the_name_of_their_software(
    key: str, software: str, tmp_path: Path
) -> None:
    save_file({key: np.ones((2, 3), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(LoraLensError, match=software):
        loralens.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("file", "software"), [("__0_0.distcp", "Megatron"), ("manifest.ocdbt", "Orbax")])
def test_a_checkpoint_of_other_software_is_named(file: str, software: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"\0")
    with pytest.raises(LoraLensError, match=software):
        loralens.load(tmp_path)
