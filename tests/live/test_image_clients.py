"""Image and video adapters that loralens writes, loaded by diffusers and by ComfyUI themselves.

ComfyUI is tested where ``LORALENS_COMFYUI`` names its sources; its models are made without numbers.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from tests.marks import when_used

diffusers, torch = when_used("diffusers"), when_used("torch")
clients = when_used("tests.live.make_image_families")
pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]
COMFYUI = os.environ.get("LORALENS_COMFYUI")
Shapes = dict[str, tuple[int, ...]]
Deltas = dict[str, np.ndarray[Any, Any]]

SMALL = {"num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 16}
# family → a small model of it; the models of Z-Image and of Lumina 2 count their blocks and sizes in other words
CONFIGS = {
    "Qwen-Image": {**SMALL, "joint_attention_dim": 32},
    "SD3": {**SMALL, "joint_attention_dim": 32, "caption_projection_dim": 48, "pooled_projection_dim": 24,
            "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
    "Wan": {**SMALL, "ffn_dim": 64, "text_dim": 32, "image_dim": 40, "added_kv_proj_dim": 48},
    "HunyuanVideo": {**SMALL, "num_single_layers": 2, "text_embed_dim": 32, "pooled_projection_dim": 24,
                     "rope_axes_dim": (4, 6, 6)},
    "LTX-Video": {**SMALL, "cross_attention_dim": 48, "caption_channels": 32},
    "LTX-2": {**SMALL, "cross_attention_dim": 48, "caption_channels": 32, "audio_num_attention_heads": 2,
              "audio_attention_head_dim": 16, "audio_cross_attention_dim": 32},
    "Z-Image": {"dim": 96, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32, "axes_dims": [16, 16, 16]},
    "Lumina2": {"hidden_size": 96, "num_layers": 2, "num_attention_heads": 6, "num_kv_heads": 2, "cap_feat_dim": 32,
                "axes_dim_rope": (4, 6, 6)},
    "FLUX.2": {**SMALL, "num_single_layers": 2, "joint_attention_dim": 32, "in_channels": 32},
    "Kandinsky 5": {"model_dim": 48, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2, "time_dim": 32,
                    "in_text_dim": 40, "in_text_dim2": 24, "axes_dims": (4, 6, 6)},
    "Chroma": {**SMALL, "num_single_layers": 2, "joint_attention_dim": 32, "approximator_hidden_dim": 40},
}  # fmt: skip


def small_model(family: str) -> Any:
    return getattr(diffusers, clients.FAMILIES[family][1])(**CONFIGS[family])


def peft_folder(folder: Path, family: str) -> Deltas:
    """An adapter of every layer of a small model as PEFT saves it; returns its updates by module."""
    rng, tensors, deltas = np.random.default_rng(0), {}, {}
    shapes = clients.weights(small_model(family))
    if family == "SD3":  # how its last block is stored depends on the number of blocks
        shapes = {name: shape for name, shape in shapes.items() if "norm1_context" not in name}
    for name, (out, *inner) in shapes.items():
        A, B = rng.standard_normal((4, *inner)), rng.standard_normal((out, 4, *(1 for _ in inner[1:])))
        tensors |= {f"base_model.model.{name}.lora_{half}.weight": np.float32(f) for half, f in (("A", A), ("B", B))}
        deltas[name] = 2 * B.reshape(out, 4) @ A.reshape(4, -1)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    base = clients.FAMILIES[family][0][0]
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": sorted(shapes)}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": base}))
    return deltas


def loaded_by_diffusers(family: str, file: Path) -> Deltas:
    loader = getattr(clients.lora_pipeline, f"{clients.FAMILIES[family][2]}LoraLoaderMixin")
    options = {"weight_name": file.name, "return_lora_metadata": True, "local_files_only": True}
    state, *_, metadata = loader.lora_state_dict(str(file.parent), **options)
    model = small_model(family)
    model.load_lora_adapter(state, prefix="transformer", metadata=metadata)
    layers = {name: each for name, each in model.named_modules() if getattr(each, "lora_A", None)}
    deltas = {name: each.get_delta_weight(*each.lora_A).detach().numpy() for name, each in layers.items()}
    return {name: delta.reshape(len(delta), -1) for name, delta in deltas.items()}


@pytest.mark.parametrize("family", CONFIGS)
def test_diffusers_loads_what_is_made_from_a_peft_folder_and_from_the_native_names(family: str, tmp_path: Path) -> None:
    expected = peft_folder(tmp_path / "peft", family)
    for source, to in (("peft", "diffusers"), ("peft", "comfyui"), ("comfyui.safetensors", "diffusers")):
        target = tmp_path / f"{to}.safetensors"
        result = loralens.convert(tmp_path / source, to=to, output=target, overwrite=True)
        assert "without loss" in result.conclusion()[0]
        if to == "diffusers":
            loaded = loaded_by_diffusers(family, target)
            assert loaded.keys() == expected.keys()
            for name, delta in expected.items():
                np.testing.assert_allclose(loaded[name], delta, atol=1e-4)


@pytest.mark.skipif(not COMFYUI, reason="needs the sources of ComfyUI (LORALENS_COMFYUI)")
@pytest.mark.parametrize("to", ["comfyui", "kohya"])
@pytest.mark.parametrize("family", CONFIGS)
def test_comfyui_loads_every_update(family: str, to: str, tmp_path: Path) -> None:
    comfy = clients.comfyui(COMFYUI)
    expected = peft_folder(tmp_path / "peft", family)
    loralens.convert(tmp_path / "peft", to=to, output=tmp_path / "out.safetensors")
    tensors = {key: torch.from_numpy(array) for key, array in load_file(tmp_path / "out.safetensors").items()}
    _, _, _, model, sizes = clients.FAMILIES[family]
    size = {"Wan": "14B I2V", "SD3": "3.5 medium"}.get(family, next(iter(sizes)))
    made = getattr(comfy.supported_models, model)(dict(sizes[size][1])).get_model({}, device="meta")
    patches = comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(made, {}), log_missing=False)
    read = set().union(*(patch.loaded_keys for patch in patches.values()))
    assert {key for key in tensors if not key.endswith(".alpha")} <= read
    # Joining layers into a matrix, and swapping its halves, keep the sum of squares.
    total = 0.0
    for patch in patches.values():
        up, down, alpha = patch.weights[:3]
        total += float((alpha / len(down) * (up.flatten(1) @ down.flatten(1))).square().sum())
    assert total == pytest.approx(sum(np.sum(delta**2) for delta in expected.values()), rel=1e-4)
