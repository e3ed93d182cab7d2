"""What the doctor says of an adapter that a common program refuses, or of which it leaves out a part."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import loralens
from tests.bases import edit_config
from tests.cli.command import Command
from tests.conftest import small_adapter

BLOCK = "down_blocks_{}_attentions_{}_transformer_blocks_0_attn{}_to_{}"
run = Command().run


def kohya(prefix: str, **more: Any) -> dict[str, np.ndarray]:
    """The cross-attention of three blocks of SD 1.5, which is enough to recognise the model."""
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for block, width in ((0, 320), (1, 640), (2, 1280)):
        for kind in "qkv":
            name = prefix + BLOCK.format(block, 0, 2, kind)
            tensors[f"{name}.lora_up.weight"] = rng.standard_normal((width, 2), np.float32)
            tensors[f"{name}.lora_down.weight"] = rng.standard_normal((2, width if kind == "q" else 768), np.float32)
            tensors[f"{name}.alpha"] = np.float32(2)
            tensors |= {f"{name}.{part}": np.ones(shape(width), np.float32) for part, shape in more.items()}
    return {key: np.asarray(tensor) for key, tensor in tensors.items()}


def said(path: Path) -> list[tuple[str, str]]:
    """Level and program of each finding about a program."""
    findings = loralens.doctor(path).findings
    return [(each.level, each.evidence.partition(":")[0]) for each in findings if each.code == "client"]


def peft(folder: Path, **config: Any) -> Path:
    loralens.save(small_adapter(), folder)
    edit_config(folder, **config)
    return folder


def test_names_that_no_program_has_are_an_error_and_the_fix_mends_it(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(kohya("lora_unet_unet_"), file)
    assert said(file) == [("error", "comfyui"), ("error", "sd-scripts")]
    for finding in [each for each in loralens.doctor(file).findings if each.code == "client"]:
        words = finding.fix.strip("`").split()
        assert run(*words[1:]).exit_code == 0
        assert said(Path(words[words.index("-o") + 1])) == []
    # Who asks for one program gets all that is to say about it, and once.
    asked = [each.code for each in loralens.doctor(file, consumer="comfyui").findings]
    assert ("names" in asked, "client" in asked) == (True, False)


def test_what_another_program_applies_is_a_note(tmp_path: Path) -> None:
    save_file(kohya("lora_unet_", dora_scale=lambda width: (width, 1)), tmp_path / "dora.safetensors")
    assert said(tmp_path / "dora.safetensors") == [("note", "sd-scripts")]
    config = {"init_lora_weights": "olora"}
    assert said(peft(tmp_path / "a", task_type="CAUSAL_LM", **config)) == [("note", "vllm")]
    # vLLM serves language models only.
    assert said(peft(tmp_path / "b", task_type="FEATURE_EXTRACTION", **config)) == []


def test_sound_adapters_and_what_is_said_already(tmp_path: Path) -> None:
    save_file(kohya("lora_unet_"), tmp_path / "a.safetensors")
    assert said(tmp_path / "a.safetensors") == []
    assert said(peft(tmp_path / "a", task_type="CAUSAL_LM")) == []
    assert said(peft(tmp_path / "b", peft_type=...)) == [("error", "peft")]
    # The reader says it, with the same words.
    found = {each.code for each in loralens.doctor(peft(tmp_path / "c", r=7)).findings}
    assert ("rank-disagrees" in found, "client" in found) == (True, False)
