"""``loralens convert`` of adapters of image models: names that the programs behind the target have, extras included."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from loralens.core import Layout
from loralens.core.image_names import comfyui_has, file_name
from tests.cli.command import Command
from tests.models import low_rank

convert = Command("convert")
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = {  # module of a diffusers UNet → shape
    f"{BLOCK}.attn1.to_q": (6, 4),
    f"{BLOCK}.attn1.to_out.0": (6, 4),
    f"{BLOCK}.ff.net.0.proj": (6, 4),
    "down_blocks.0.resnets.0.conv1": (6, 4, 3, 3),
    "mid_block.attentions.0.proj_in": (6, 4, 1, 1),
}
FIRST = {f"encoder.layers.{i}.{kind}": (6, 4) for i in (0, 1) for kind in ("self_attn.q_proj", "mlp.fc1")}
SECOND = {f"text_model.{name}": (6, 4) for name in FIRST}  # CLIPTextModelWithProjection


def component(folder: Path, modules: dict[str, tuple[int, ...]]) -> Path:
    folder.mkdir(parents=True)
    held = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in modules.items()}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline as transformers 5 and diffusers save one."""
    folder = tmp_path_factory.mktemp("pipeline")
    component(folder / "unet", UNET)
    component(folder / "text_encoder", FIRST)
    component(folder / "text_encoder_2", SECOND)
    return folder


def flat(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


@pytest.fixture
def dora(tmp_path: Path) -> Path:
    """A kohya file with DoRA on every module."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in UNET.items():
        ones = (1,) * (len(shape) - 2)
        tensors[f"{flat(name)}.lora_up.weight"] = rng.standard_normal((6, 2, *ones)).astype("f")
        tensors[f"{flat(name)}.lora_down.weight"] = rng.standard_normal((2, *shape[1:])).astype("f")
        tensors[f"{flat(name)}.alpha"] = np.float32(1)
        tensors[f"{flat(name)}.dora_scale"] = rng.random((6, 1, *ones)).astype("f")
    save_file({key: np.asarray(tensor) for key, tensor in tensors.items()}, tmp_path / "dora.safetensors")
    return tmp_path / "dora.safetensors"


def peft(path: Path, names: dict[str, tuple[int, ...]]) -> Path:
    modules = {}
    for i, (name, shape) in enumerate(names.items()):
        layout = Layout("conv", kernel=shape[2:]) if shape[2:] else None
        modules[name] = low_rank(6, int(np.prod(shape[1:])), scale=0.5, seed=i, layout=layout)
    loralens.save(loralens.Adapter(modules=modules), path)
    return path


def stems(path: Path) -> set[str]:
    """What a file calls its modules."""
    return {name for key in load_file(path) if (name := file_name([key]))}


def test_kohya_with_a_base_keeps_dora(dora: Path, pipeline: Path, tmp_path: Path) -> None:
    """All was lost before: pairs were called lora_unet_…, their magnitudes down_blocks.0….dora_scale."""
    out = tmp_path / "out.safetensors"
    convert.good(dora, "-o", out, "--to", "kohya", "--base", pipeline / "unet")
    before, after = load_file(dora), load_file(out)
    assert set(after) == set(before)
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key], tensor)


@pytest.mark.parametrize("to", ["comfyui", "kohya", "diffusers"])
@pytest.mark.parametrize("folder", ["unet", "."], ids=["the UNet's folder", "the pipeline's"])
def test_a_unet_gets_the_keys_that_the_programs_look_up(pipeline: Path, tmp_path: Path, to: str, folder: str) -> None:
    """Written out: what ComfyUI's ``model_lora_keys_unet`` and sd-scripts make of diffusers' names."""
    names = {f"unet.{name}": shape for name, shape in UNET.items()}
    source, out = peft(tmp_path / "a", names if folder == "." else UNET), tmp_path / "out.safetensors"
    convert.good(source, "-o", out, "--to", to, "--base", pipeline / folder)
    if to == "diffusers":
        assert stems(out) == set(names)
    else:
        looked_up = set(names) if to == "comfyui" else set(map(flat, UNET))
        looked_up = {name.replace("attn1.to_q", "attn1.processor.to_q") for name in looked_up}
        looked_up = {name.replace("attn1.to_out.0", "attn1.processor.to_out") for name in looked_up}
        ends = (".lora_up.weight", ".lora_down.weight", ".alpha")
        assert set(load_file(out)) == {name + end for name in looked_up for end in ends}
    assert list(loralens.load(out)) == list(loralens.load(source))


@pytest.mark.parametrize("to", ["comfyui", "kohya", "diffusers"])
@pytest.mark.parametrize(("folder", "names"), [("text_encoder", FIRST), ("text_encoder_2", SECOND)])
def test_a_text_encoder_alone_is_none_in_particular(
    pipeline: Path, tmp_path: Path, to: str, folder: str, names: dict[str, tuple[int, ...]]
) -> None:
    source, out = peft(tmp_path / "a", names), tmp_path / "out.safetensors"
    said = convert.refused(source, "-o", out, "--to", to, "--base", pipeline / folder)
    first = next(iter(names)).partition(".")[0]
    assert "nothing says which of the pipeline's text encoders that is" in said
    assert f"--prefix {first}.=text_encoder.{first}." in said
    assert not out.exists()
    convert.good(source, "-o", out, "--to", to, "--prefix", f"{first}.={folder}.{first}.")
    assert all(map(comfyui_has, stems(out)))


def test_names_that_comfyui_would_ignore_are_refused(tmp_path: Path) -> None:
    source = peft(tmp_path / "a", {"unet.down_blocks.0.motion_modules.0.proj_in": (6, 4)})
    said = convert.refused(source, "-o", tmp_path / "out.safetensors", "--to", "comfyui")
    assert "ComfyUI has no weight of the name unet.down_blocks.0.motion_modules.0.proj_in" in said
    assert "loralens drop" in said
