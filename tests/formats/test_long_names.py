"""Names of thousands of dotted parts take memory in proportion to the file, not to its square."""

import json

import pytest

import loralens
from loralens.core.matching import match
from loralens.formats.dialects.gguf.architectures import place_of
from loralens.formats.dialects.peft.config import PeftConfig
from tests.analysis.checks.patients import diagnose
from tests.formats.blobs import limits
from tests.formats.test_fuzz import packed
from tests.marks import slow_except

MIB = 1 << 20
COUNT = 15
LETTERS = ".".join("abcdefghij"[i % 10] for i in range(1900))
DIGITS = ".".join("1234567890"[i % 10] for i in range(1900))
DIALECTS = {
    "peft": ("base_model.model.{}.lora_{}.weight", "AB"),
    "diffusers": ("unet.{}.lora_{}.weight", "AB"),
    "kohya": ("lora_unet_{}.lora_{}.weight", ("up", "down")),
    "comfyui": ("diffusion_model.{}.lora_{}.weight", ("up", "down")),
    "loralib": ("{}.lora_{}", "AB"),
    "torchtune": ("{}.lora_{}.weight", "ab"),
    "mlx": ("{}.lora_{}", "ab"),
}


def names(path):
    return [f"{path}.m{i}" for i in range(COUNT)]


@pytest.mark.some(2)
@pytest.mark.parametrize("path", [LETTERS, DIGITS], ids=["letters", "digits"])
@pytest.mark.parametrize("dialect", slow_except(DIALECTS, "peft", "kohya"))
def test_a_file_of_long_names_takes_ten_times_its_size(dialect, path, tmp_path):
    key, halves = DIALECTS[dialect]
    weights = packed({key.format(name, half): ("F16", [1, 1]) for name in names(path) for half in halves})
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    config = b""
    if dialect == "peft":
        fields = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [f"m{i}" for i in range(COUNT)]}
        config = json.dumps(fields).encode()
        (tmp_path / "adapter_config.json").write_bytes(config)
    diagnose({"it": loralens.load(tmp_path, strict=False)})  # imports, and regular expressions that are compiled once
    with limits(30, 10 * (len(weights) + len(config)) + MIB):
        adapter = loralens.load(tmp_path, strict=False)
        diagnose({"it": adapter})
    assert len(adapter) == COUNT


def test_targets_and_patterns_of_long_names():
    paths = names(LETTERS)
    fields = {
        "target_modules": paths,
        "target_parameters": [f"{path}.w" for path in paths],
        "rank_pattern": dict.fromkeys(paths, 2),
        "alpha_pattern": dict.fromkeys(names(DIGITS), 2),
    }
    with limits(30, 10 * len(json.dumps(fields))):
        config = PeftConfig(fields)
        assert [config.scaling(path).rank for path in paths] == [2] * COUNT
        assert not config.unmatched_targets(paths)
        assert not config.unmatched_modules(paths)


@pytest.mark.slow
def test_many_leading_parts_of_a_base_are_not_all_tried():
    modules = {f"m{i}": (2, 2) for i in range(300)}
    base = {f"x{i}.m0.weight": (2, 2) for i in range(3000)}
    with limits(20, 30 * MIB), pytest.raises(loralens.MismatchError, match="have no weight"):
        match(modules, base)


def test_a_name_of_numbers_has_no_place_in_gguf():
    assert place_of("model.layers.0.self_attn.q_proj", "llama")
    with limits(10, MIB):
        assert place_of(DIGITS, "llama") is None
