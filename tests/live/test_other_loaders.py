"""Image and video adapters that loralens writes, read by the code of musubi-tuner, lightx2v and OneTrainer itself.

Each is tested where a variable names its sources: ``LORALENS_MUSUBI`` (30c658c4), ``LORALENS_LIGHTX2V`` (f8aee98b),
``LORALENS_ONETRAINER`` (23df3832). They need the packages ftfy, easydict, loguru and parse, and no weights.
"""

import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from tests.live.test_image_clients import clients, peft_folder, small_model, torch

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]
# family → the module and the class of musubi's model, and what its constructor needs
MUSUBI: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen-Image": ("qwen_image.qwen_image_model", "QwenImageTransformer2DModel", {}),
    "Wan": ("wan.modules.model", "WanModel", {"model_type": "i2v"}),
    "HunyuanVideo": (
        "hunyuan_model.models",
        "HYVideoDiffusionTransformer",
        {"text_states_dim": 4096, "text_states_dim_2": 768},
    ),
    "Z-Image": ("zimage.zimage_model", "ZImageTransformer2DModel", {}),
    "FLUX.2": ("flux_2.flux2_models", "Flux2", {}),
    "Kandinsky 5": ("kandinsky5.models.dit", "DiffusionTransformer3D", {"visual_cond": True}),
}


def sources(variable: str, *inside: str) -> None:
    """Put the sources of a program first on the path, or skip."""
    if variable not in os.environ:
        pytest.skip(f"needs the sources that {variable} names")
    sys.path.insert(0, str(Path(os.environ[variable], *inside)))


def squares(deltas: dict[str, Any]) -> float:
    return float(sum(np.sum(np.square(np.asarray(delta, np.float64))) for delta in deltas.values()))


def musubi_names(family: str) -> dict[str, str]:
    """The names of the layers of musubi's model, by those that its files have."""
    module, name, options = MUSUBI[family]
    made = import_module(f"musubi_tuner.{module}")
    with torch.device("meta"):
        model = getattr(made, name)(**options, **({"params": made.Flux2Params()} if family == "FLUX.2" else {}))
    return {f"lora_unet_{name.replace('.', '_')}": name for name in clients.weights(model)}


# The layers that musubi's models call otherwise than the checkpoint of ComfyUI: that of Z-Image as diffusers does, with
# q, k and v apart, and that of HunyuanVideo as the first checkpoint did.
FOREIGN = {
    "Z-Image": r"attention_(qkv|out)|x_embedder|final_layer_\w+",
    "HunyuanVideo": r"\w+_(mod_lin|modulation_lin|mlp_[02]|in_layer|out_layer)",
}


@pytest.mark.parametrize("family", MUSUBI)
def test_musubi_merges_files_of_kohya(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources("LORALENS_MUSUBI", "src")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)  # a default of Wan's constructor
    merge = import_module("musubi_tuner.utils.lora_utils").load_safetensors_with_lora_and_fp8
    expected = peft_folder(tmp_path / "peft", family)
    loralens.convert(tmp_path / "peft", to="kohya", output=tmp_path / "out.safetensors")
    stored, known = load_file(tmp_path / "out.safetensors"), musubi_names(family)
    names = {key.partition(".")[0] for key in stored}
    unknown = names - known.keys()
    assert all(re.search(f"({FOREIGN.get(family, '-')})$", name) for name in unknown)
    assert bool(unknown) == (family in FOREIGN)
    base, left = {}, 0.0
    for name in names - unknown:
        up, down, alpha = (stored[f"{name}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        if down.ndim < 5:
            base[f"{known[name]}.weight"] = np.zeros((len(up), *down.shape[1:]), np.float32)
        else:  # its merge does not take convolutions in three dimensions
            left += np.square(alpha / len(down) * up.reshape(len(up), -1) @ down.reshape(len(down), -1)).sum()
    save_file(base, tmp_path / "base.safetensors")
    tensors = {key: torch.from_numpy(array) for key, array in stored.items()}
    merged = merge(str(tmp_path / "base.safetensors"), [tensors], [1.0], False, torch.device("cpu"))
    if not unknown:
        # Joining layers into a matrix, and swapping its halves, keep the sum of squares.
        assert squares(merged) + left == pytest.approx(squares(expected), rel=1e-4)
    assert all(weight.any() for weight in merged.values())


# family → options of `convert`, and the prefix of lightx2v's own names
LIGHTX2V = {"Wan": ({}, None), "Qwen-Image": ({"prefix": "=diffusion_model."}, None)}
LIGHTX2V |= {"LTX-2": ({}, "model.diffusion_model."), "HunyuanVideo": ({}, None)}


@pytest.mark.parametrize("family", LIGHTX2V)
def test_lightx2v_applies_native_files(family: str, tmp_path: Path) -> None:
    sources("LORALENS_LIGHTX2V")
    options, prefix = LIGHTX2V[family]
    expected = peft_folder(tmp_path / "peft", family)
    loralens.convert(tmp_path / "peft", to="comfyui", output=tmp_path / "out.safetensors", **options)
    stored, weights = load_file(tmp_path / "out.safetensors"), {}
    for key in (key for key in stored if key.endswith(".lora_up.weight")):
        name = key.removesuffix(".lora_up.weight")
        down = stored[f"{name}.lora_down.weight"]
        shape = (len(stored[key]), *down.shape[1:])
        weights[f"{prefix or ''}{name.removeprefix('diffusion_model.')}.weight"] = torch.zeros(shape)
    flat = {key: weight for key, weight in weights.items() if weight.ndim == 2}
    tensors = {key: torch.from_numpy(array) for key, array in stored.items()}
    loader = import_module("lightx2v.utils.lora_loader").LoRALoader(model_prefix=prefix)
    # It applies matrices alone, and says so of a convolution.
    assert loader.apply_lora(weights, tensors) == len(flat)
    if len(flat) == len(weights):
        assert squares(weights) == pytest.approx(squares(expected), rel=1e-4)


# family → OneTrainer's class, and the dialects that it reads completely
ONETRAINER = {
    "Qwen-Image": ("QwenModel", ("comfyui", "kohya")), "SD3": ("StableDiffusion3Model", ("comfyui", "kohya")),
    "HunyuanVideo": ("HunyuanVideoModel", ()), "Z-Image": ("ZImageModel", ("comfyui",)),
    "FLUX.2": ("Flux2Model", ("comfyui", "kohya")), "Chroma": ("ChromaModel", ("comfyui", "kohya")),
}  # fmt: skip


@pytest.mark.parametrize("to", ["comfyui", "kohya", "diffusers"])
@pytest.mark.parametrize("family", ONETRAINER)
def test_onetrainer_reads_every_layer(family: str, to: str, tmp_path: Path) -> None:
    sources("LORALENS_ONETRAINER")
    reader = import_module("modules.util.load_lora_util")
    name, complete = ONETRAINER[family]
    model = object.__new__(getattr(import_module(f"modules.model.{name}"), name))  # the maps of names need no weights
    model.transformer = small_model(family)
    expected = peft_folder(tmp_path / "peft", family)
    loralens.convert(tmp_path / "peft", to=to, output=tmp_path / "out.safetensors")
    tensors = {key: torch.from_numpy(array) for key, array in load_file(tmp_path / "out.safetensors").items()}
    bodies = (model.lora_diffusers_to_original(), model.lora_diffusers_to_comfy(), model.fusion_groups())
    names = {"transformer": set(clients.weights(model.transformer))}

    def canonical() -> dict[str, Any]:
        normal, kohya = reader.normalize_various(tensors), model.lora_diffusers_to_kohya()
        read: dict[str, Any] = reader.to_canonical(normal, "transformer", *bodies, [], None, kohya, names)
        return read

    if to not in ("diffusers", *complete):
        with pytest.raises(RuntimeError, match="No conversion found"):
            canonical()
        return
    state, read = canonical(), {}
    for key in (key for key in state if key.endswith(".lora_up.weight")):
        name = key.removesuffix(".lora_up.weight")
        up, down = state[key].flatten(1), state[f"{name}.lora_down.weight"].flatten(1)
        read[name] = float(state[f"{name}.alpha"]) / len(down) * up @ down
    # It does not read the metadata of diffusers, where α/r is 2, and takes α = r.
    assert squares(read) == pytest.approx(squares(expected) / (4 if to == "diffusers" else 1), rel=1e-4)
