"""The table of image and video models is consistent, and conversions use it."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from loralens import LoraLensError
from loralens.core.image_families import client_versions, families, names_mapped
from loralens.core.image_models import FAMILY_WORDS, ImageModel, Shape, family_models

FAMILIES = families()


def models(family: str) -> list[ImageModel]:
    """One model for each size of a family, made of all layers of that size."""
    found = []
    for size in FAMILIES[family].sizes:
        shapes = {
            f"transformer.{row.name.replace('#', str(i))}": (shape[0], int(np.prod(shape[1:])))
            for row in FAMILIES[family].layers
            for start, stop, *shape in row.sizes.get(size, ())
            for i in range(start, stop)
        }
        found += family_models(shapes, FAMILIES[family].words[0])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_is_found_by_each_of_its_names(family: str) -> None:
    assert len(models(family)) == len(FAMILIES[family].sizes)
    for model in models(family):
        for layer in model.layers:
            assert model.find(layer.name, layer.update_shape) == (layer,)
            whole = model.by_original[layer.original]
            shape = sum(part.shape[0] for part in whole), layer.update_shape[1]
            assert model.find(layer.original, shape) == model.find(model.kohya(layer), shape) == whole


@pytest.mark.parametrize("family", FAMILIES)
def test_clients_map_the_names_that_are_written(family: str) -> None:
    layers = [layer for layer in models(family)[0].layers if layer.name.startswith("transformer.")]
    model = models(family)[0]

    def all_mapped(client: str, names: Iterable[str]) -> bool:
        return all(names_mapped(client, family, names).values())  # type: ignore[arg-type]

    assert all_mapped("diffusers", (layer.name for layer in layers))
    assert all_mapped("comfyui", (layer.original for layer in layers))
    assert all_mapped("comfyui", (model.kohya(layer) for layer in layers))
    assert all_mapped("comfyui", (layer.name for layer in layers if layer.name not in model.native_only))
    assert not any(names_mapped("comfyui", family, ("transformer.stranger", "diffusion_model.stranger")).values())


def test_the_first_words_are_those_of_the_table() -> None:
    names = (name for family in FAMILIES.values() for row in family.layers for name in (row.name, row.native))
    assert {name.partition(".")[0].partition("_")[0] for name in names} | {"encoder", "text"} == FAMILY_WORDS


def write(path: Path, shapes: dict[str, Shape], leaves: tuple[str, str] = ("lora_A.weight", "lora_B.weight")) -> Path:
    rng = np.random.default_rng(7)
    tensors = {}
    for name, (out, width) in shapes.items():
        tensors[f"{name}.{leaves[0]}"] = rng.random((2, width), np.float32)
        tensors[f"{name}.{leaves[1]}"] = rng.random((out, 2), np.float32)
    save_file(tensors, path)
    return path


def names(path: Path) -> set[str]:
    return {key.removesuffix(".lora_up.weight") for key in load_file(path) if key.endswith(".lora_up.weight")}


WAN = {f"blocks.0.attn1.to_{part}": (1536, 1536) for part in "qkv"}
QKV = "double_blocks.19.img_attn.qkv"
HUNYUAN = {f"transformer.transformer_blocks.19.attn.to_{part}": (3072, 3072) for part in "qkv"} | {
    "transformer.single_transformer_blocks.39.proj_out": (3072, 15360)
}


@pytest.mark.parametrize(
    ("shapes", "to", "expected"),
    [
        (WAN, "comfyui", {f"diffusion_model.blocks.0.self_attn.{part}" for part in "qkv"}),
        (WAN, "kohya", {f"lora_unet_blocks_0_self_attn_{part}" for part in "qkv"}),
        # q, k and v are one matrix there
        (HUNYUAN, "comfyui", {f"diffusion_model.{QKV}", "diffusion_model.single_blocks.39.linear2"}),
    ],
    ids=["Wan", "Wan kohya", "HunyuanVideo"],
)  # fmt: skip
def test_layers_get_the_names_that_the_program_has(
    shapes: dict[str, Shape], to: str, expected: set[str], tmp_path: Path
) -> None:
    source = write(tmp_path / "a.safetensors", shapes, ("lora_A.default.weight", "lora_B.default.weight"))
    result = loralens.convert(source, to=to, output=tmp_path / "b.safetensors")
    assert names(tmp_path / "b.safetensors") == expected
    assert "without loss" in result.conclusion()[0]
    there = tmp_path / "c.safetensors"
    back = loralens.convert(tmp_path / "b.safetensors", to="diffusers", output=there).adapter
    plain = {name.removeprefix("transformer."): module for name, module in loralens.load(source).items()}
    assert {name.removeprefix("transformer.") for name in back} == plain.keys()
    for name, module in back.items():
        first = plain[name.removeprefix("transformer.")]
        # ΔW of a layer of 3072 × 12288 takes seconds, and its product with a few vectors tells two of them apart.
        x = np.random.default_rng(0).standard_normal((first.shape[1], 3))
        wanted, got = (one.scale * (one.B.astype(float) @ (one.A.astype(float) @ x)) for one in (first, module))
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


def test_names_that_no_program_is_known_to_load_are_reported(tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", {"transformer.transformer_blocks.0.attn1.to_q": (48, 48)})
    result = loralens.convert(source, to="comfyui", output=tmp_path / "b.safetensors")
    assert result.unmapped == ("transformer.transformer_blocks.0.attn1.to_q",)
    assert "1 name that no program is known to load" in result.conclusion()[0]
    assert any("is not known to load transformer.transformer_blocks" in line for line in result.sentences())


def test_a_control_lora_of_flux_stays_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", {"double_blocks.0.img_attn.proj": (3072, 3072)})
    assert loralens.load(source).format == "comfyui"
    tensors = {**load_file(source), "double_blocks.0.img_attn.norm.query_norm.scale": np.ones(128, np.float32)}
    save_file(tensors, tmp_path / "control.safetensors")
    with pytest.raises(LoraLensError, match="no LoRA pairs of any dialect"):
        loralens.load(tmp_path / "control.safetensors")


# What the columns of the table in docs/formats.md are: naming schemes of diffusers, and of ComfyUI.
COLUMNS = (
    ("transformer.D lora_A", "transformer.D"),
    ("D lora_A", "D"),
    ("base_model.model.D lora_A", "base_model.model.D"),
    ("lora_transformer_D_ lora_down", "lora_transformer_D_"),
    ("diffusion_model.N lora_A", "diffusion_model.N"),
    ("diffusion_model.N lora_down", "diffusion_model.N"),
    ("lora_unet_N_ lora_down", "lora_unet_N_"),
)


def cell(family: str, schemes: tuple[str, str]) -> str:
    """What diffusers and ComfyUI load of a naming scheme."""
    count, texts = len(FAMILIES[family].layers), []
    for client, scheme in zip(("diffusers", "comfyui"), schemes, strict=True):
        lost = FAMILIES[family].clients[client].get(scheme)
        texts.append("–" if lost is None else "all" if not lost else f"{count - len(lost)} of {count}")
    return " / ".join(texts)


def test_the_table_in_the_documents_is_that_of_the_clients() -> None:
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    for family in FAMILIES:
        row = " | ".join(cell(family, schemes) for schemes in COLUMNS)
        assert f"| {family} | {row} |" in text, f"| {family} | {row} |"
    assert all(f"{client} {version}" in text.lower() for client, version in client_versions().items())


BLOCKS = {"double_blocks.{}.img_attn.proj": (3072, 3072), "single_blocks.{}.linear1": (21504, 3072)}


def blocks(file: Path, *numbers: int, metadata: dict[str, str] | None = None) -> Path:
    """A file of kohya with these blocks, which FLUX.1, HunyuanVideo and Chroma have with equal names and shapes."""
    tensors = {}
    for pattern, (out, in_) in BLOCKS.items():
        for number in numbers:
            name = f"lora_unet_{pattern.format(number).replace('.', '_')}"
            tensors |= {f"{name}.lora_down.weight": np.ones((1, in_), np.float32), f"{name}.alpha": np.ones(1)}
            tensors[f"{name}.lora_up.weight"] = np.ones((out, 1), np.float32)
    save_file(tensors, file, metadata)
    return file


def test_blocks_of_several_families_are_said_to_be_of_all_of_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = blocks(tmp_path / "a.safetensors", 0, 1)
    assert "for FLUX.1 or HunyuanVideo or Chroma, by the names" in loralens.inspect(file).conclusion()[0]
    loralens.convert(file, to="diffusers", output=tmp_path / "d.safetensors")
    assert not caplog.records  # the names are those of all three
    loralens.convert(file, to="comfyui", output=tmp_path / "c.safetensors")
    assert "nothing in the file says whether it is of FLUX.1 or of HunyuanVideo" in caplog.text


@pytest.mark.parametrize("hint", ["hunyuan-video", "flux-1-dev"])
def test_the_metadata_decide_between_families(hint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = blocks(tmp_path / "a.safetensors", 0, 1, metadata={"modelspec.architecture": hint})
    name = {"h": "HunyuanVideo", "f": "FLUX.1"}[hint[0]]
    assert f"for {name}, by the names" in loralens.inspect(file).conclusion()[0]
    loralens.convert(file, to="comfyui", output=tmp_path / "c.safetensors")
    assert not caplog.records


def test_the_last_block_decides_between_families(tmp_path: Path) -> None:
    tensors = load_file(blocks(tmp_path / "a.safetensors", 18))
    save_file({key: value for key, value in tensors.items() if "double" in key}, tmp_path / "c.safetensors")
    assert "for FLUX.1 or Chroma, by the names" in loralens.inspect(tmp_path / "c.safetensors").conclusion()[0]
