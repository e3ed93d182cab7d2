"""``convert --to kohya`` of kohya files whose names sd-scripts and ComfyUI do not have."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from tests.cli.command import Command
from tests.formats import test_image as images


@pytest.mark.parametrize(
    ("model", "wrong"),
    [
        ("SDXL", {"unet.": "lora_unet_", "text_encoder.": "lora_te_"}),
        ("SDXL", {"unet.": "lora_unet_unet_", "text_encoder.": "lora_te1_"}),
        ("FLUX", {"transformer.": "lora_unet_", "text_encoder.": "lora_te_"}),
    ],
)
@pytest.mark.parametrize("leaf", [".lora_", "_lora_"])
def test_wrong_names_of_a_kohya_file_become_those_of_sd_scripts(
    tmp_path: Path, model: str, wrong: dict[str, str], leaf: str
) -> None:
    """As some converters write them: names of diffusers behind kohya's prefix."""
    original = images.adapter(getattr(images, model))
    tensors = {}
    for name, module in original.items():
        start = next(each for each in wrong if name.startswith(each))
        file = wrong[start] + name.removeprefix(start).replace(".", "_")
        kernel = images.LAYERS[name].shape[2:]
        A = module.A.reshape(len(module.A), -1, *kernel) if kernel else module.A
        B = module.B.reshape(*module.B.shape, 1, 1) if kernel else module.B
        tensors |= {f"{file}{leaf}down.weight": A, f"{file}{leaf}up.weight": B, f"{file}.alpha": np.float32(1)}
    given, right = tmp_path / "wrong.safetensors", tmp_path / "right.safetensors"
    notes = {"ss_tag_frequency": '{"a": {"ohwx": 3}}', "ss_network_module": "networks.lora"}
    save_file({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, given, metadata=notes)
    result = loralens.convert(given, to="kohya", output=right)
    assert f" of {len(original)} modules got the names that sd-scripts has" in result.notes[0]
    loralens.convert(original, to="kohya", output=tmp_path / "expected.safetensors")
    assert images.stems(right) == images.stems(tmp_path / "expected.safetensors")
    assert (loralens.load(right).metadata or {})["ss_tag_frequency"] == notes["ss_tag_frequency"]
    # The halves of norm_out are in the other order in the original checkpoint, which only the name says.
    loralens.convert(images.bare(right), to="diffusers", output=tmp_path / "back.safetensors")
    images.check_same(loralens.load(tmp_path / "back.safetensors"), original)


def test_a_kohya_file_with_right_names_keeps_its_bytes_and_its_training_metadata(tmp_path: Path) -> None:
    loralens.convert(images.adapter(images.SDXL), to="kohya", output=tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors", metadata={"ss_tag_frequency": "{}"})
    result = loralens.convert(tmp_path / "b.safetensors", to="kohya", output=tmp_path / "c.safetensors")
    assert not result.notes
    copied = load_file(tmp_path / "c.safetensors")
    assert copied.keys() == tensors.keys()
    assert all(np.array_equal(copied[key], tensor) for key, tensor in tensors.items())
    assert (loralens.load(tmp_path / "c.safetensors").metadata or {})["ss_tag_frequency"] == "{}"


def test_names_of_an_unknown_model_that_no_program_has_stay_with_a_warning(tmp_path: Path) -> None:
    zeros = np.zeros((4, 4), np.float32)
    tensors = {f"lora_unet_single_transformer_blocks_0_attn_to_x.lora_{part}.weight": zeros for part in ("up", "down")}
    save_file(tensors, tmp_path / "odd.safetensors")
    said = Command("convert").good(tmp_path / "odd.safetensors", "--to", "kohya", "-o", tmp_path / "out.safetensors")
    assert "pass over 1 of 1 modules, whose names they do not have: lora_unet_single_transformer" in said.stderr
    assert load_file(tmp_path / "out.safetensors").keys() == tensors.keys()


def test_magnitudes_of_layers_that_are_joined_stay_a_dora_scale(tmp_path: Path) -> None:
    """As OneTrainer writes FLUX: the names of diffusers, and q, k and v as layers of their own."""
    rng, tensors = np.random.default_rng(0), {}
    for part in "qkv":
        name = f"lora_transformer_transformer_blocks_0_attn_to_{part}"
        tensors[f"{name}.lora_up.weight"] = rng.random((3072, 2), np.float32)
        tensors[f"{name}.lora_down.weight"] = rng.random((2, 3072), np.float32)
        tensors[f"{name}.dora_scale"] = rng.random((3072, 1), np.float32)
    save_file(tensors, tmp_path / "a.safetensors")
    loralens.convert(tmp_path / "a.safetensors", to="kohya", output=tmp_path / "b.safetensors")
    written = load_file(tmp_path / "b.safetensors")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    assert {key.removeprefix(f"{stem}.") for key in written} == {
        "lora_up.weight", "lora_down.weight", "alpha", "dora_scale",
    }  # fmt: skip
    scales = [tensor for key, tensor in tensors.items() if key.endswith("dora_scale")]
    np.testing.assert_array_equal(written[f"{stem}.dora_scale"], np.concatenate(scales))
