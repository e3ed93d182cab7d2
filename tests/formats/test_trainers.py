"""What trainers change in PEFT's files: wrappers in names, files in several parts, values of the configuration."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from loralens.errors import LoraLensError
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
    assert not adapter.findings


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
