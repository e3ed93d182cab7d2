"""Names of thousands of dotted parts take memory in proportion to the file, not to its square."""

import json

import numpy as np
import pytest

import loralens
from loralens.core.matching import match
from loralens.core.names import natural_key
from loralens.formats.dialects.gguf.names import place_of
from loralens.formats.dialects.peft.config import PeftConfig
from loralens.formats.files.container import Stored
from loralens.formats.files.json_text import json_text
from loralens.formats.files.writing import write_safetensors
from loralens.merging.checkpoint_difference import compare_checkpoints
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


def test_names_are_sorted_in_their_own_size():
    size = COUNT * len(DIGITS)
    with limits(30, 10 * size):
        assert sorted(names(DIGITS), key=natural_key) == names(DIGITS)


def test_names_are_matched_with_a_base_in_their_own_size():
    modules = dict.fromkeys(names(LETTERS), (2, 2))
    base = {f"x.{name}.weight": (2, 2) for name in names(LETTERS)}
    with limits(30, 10 * sum(map(len, base)) + MIB):
        assert match(modules, base).edit == "adding 'x.'"


@pytest.mark.slow
def test_many_leading_parts_of_a_base_are_not_all_tried():
    modules = {f"m{i}": (2, 2) for i in range(300)}
    base = {f"x{i}.m0.weight": (2, 2) for i in range(3000)}
    with limits(20, 30 * MIB), pytest.raises(loralens.MismatchError, match="have no weight"):
        match(modules, base)


def test_two_checkpoints_of_long_names_are_compared_in_their_own_size():
    tensors = {f"{name}.weight": loralens.core.lazy.LazyArray.of(np.ones((2, 2))) for name in names(LETTERS)}
    with limits(30, 10 * sum(map(len, tensors)) + MIB):
        assert len(compare_checkpoints(tensors, tensors).matrices) == COUNT


def test_a_file_of_long_names_is_written_in_its_own_size(tmp_path):
    tensors = {
        f"{name}.{half}": loralens.core.lazy.LazyArray.of(np.ones(1)) for name in names(LETTERS) for half in "AB"
    }
    said = {"said": "x" * sum(map(len, tensors))}
    path = tmp_path / "x.safetensors"
    write_safetensors(Stored(tensors, said), path)  # imports
    with limits(30, 3 * path.stat().st_size // 2):
        write_safetensors(Stored(tensors, said), path)


def test_json_of_long_names_is_made_in_its_own_size():
    content = dict.fromkeys(names(LETTERS), "σ")
    json_text({"x": 1})
    size = 2 * len(json_text(content))  # in memory: σ makes every letter take two bytes
    with limits(10, 2 * size):
        json_text(content)


def test_a_name_of_numbers_has_no_place_in_gguf():
    assert place_of("model.layers.0.self_attn.q_proj", "llama")
    with limits(10, MIB):
        assert place_of(DIGITS, "llama") is None
