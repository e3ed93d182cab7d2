"""Makes the conformance folders diffusers-*: tiny adapters that diffusers saved, and the ΔW that PEFT computes.

Run by hand: ``python -m tests.conformance.make_diffusers``. ``expected.safetensors`` is float64 ΔW (out, in·k…) by
module, from PEFT's ``get_delta_weight`` on the adapted model in float64; where diffusers has no writer for an old
generation of keys, from the literal product in NumPy. Nothing here imports loralens. The
numbers are the same each time; the order of entries in the header is safetensors' whim.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.numpy import save_file
from transformers import CLIPTextConfig, CLIPTextModel

HERE = Path(__file__).parent
ATTN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
TEXT = "encoder.layers.0.self_attn"


def unet(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=4, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6, attention_head_dim=4,
    ).double()  # fmt: skip


def flux(seed: int = 0) -> FluxTransformer2DModel:
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=6, pooled_projection_dim=6, axes_dims_rope=(2, 2, 4),
    ).double()  # fmt: skip


def text_encoder(seed: int = 0) -> CLIPTextModel:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        hidden_size=6, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=20,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return CLIPTextModel(config).double()


def pipeline(seed: int = 0) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=2), text_encoder=text_encoder(seed),
        tokenizer=None, unet=unet(seed), scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def adapt(model: torch.nn.Module, seed: int = 1, **config: Any) -> None:
    """Add an adapter with every factor random.

    Not through ``add_adapter``: transformers 5.24 asks there for a PEFT that is not released.
    """
    said = LoraConfig(**config)
    inject_adapter_in_model(said, model, "default")
    said.target_modules = sorted(said.target_modules)  # a set would be written in another order each time
    model.peft_config = {"default": said}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).float())


def deltas(model: torch.nn.Module, prefix: str) -> dict[str, np.ndarray]:
    """ΔW of every adapted module as PEFT computes it, float64, (out, in·k…)."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.active_adapters
            delta = layer.get_delta_weight(adapter).detach().numpy()
            assert delta.dtype == np.float64
            assert np.abs(delta).max() > 1e-3
            found[f"{prefix}{name}"] = np.ascontiguousarray(delta.reshape(len(delta), -1))
    return found


def config_of(model: torch.nn.Module) -> dict[str, Any]:
    return model.peft_config["default"].to_dict()


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.float() for key, tensor in get_peft_model_state_dict(model, adapter_name="default").items()}


def case(name: str) -> Path:
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    return folder


def save_expected(folder: Path, expected: dict[str, np.ndarray]) -> None:
    save_file(dict(sorted(expected.items())), folder / "expected.safetensors")


def save_raw(folder: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata)


def saved_by_a_model() -> None:
    """``save_lora_adapter``: no component in the keys, the configuration flat in the header, patterns in it; a conv."""
    model = unet()
    targets = ["attn2.to_q", "attn2.to_out.0", "proj_in", "conv_in"]
    adapt(model, r=2, lora_alpha=6, target_modules=targets, rank_pattern={"conv_in": 3}, alpha_pattern={"to_q": 1.5})
    model.float().save_lora_adapter(case("diffusers-model"))
    save_expected(case("diffusers-model"), deltas(model.double(), ""))


def saved_by_a_pipeline() -> None:
    """``save_lora_weights`` with both configurations: rsLoRA in the text encoder, DoRA in the UNet."""
    model, text = unet(), text_encoder()
    adapt(model, r=2, lora_alpha=6, target_modules=["attn2.to_q"], use_dora=True)
    adapt(text, r=3, lora_alpha=4, target_modules=["q_proj"], use_rslora=True)
    folder = case("diffusers-pipeline")
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=state_of(model), text_encoder_lora_layers=state_of(text),
        unet_lora_adapter_metadata=config_of(model), text_encoder_lora_adapter_metadata=config_of(text),
    )  # fmt: skip
    save_expected(folder, deltas(model, "unet.") | deltas(text, "text_encoder."))


def saved_without_header() -> None:
    """The same without configurations: scale 1 whatever the training had, ranks mixed."""
    model, text = unet(), text_encoder()
    adapt(model, r=2, lora_alpha=2, target_modules=["attn2.to_q", "attn1.to_k"],
          rank_pattern={"to_k": 3}, alpha_pattern={"to_k": 3})  # fmt: skip
    adapt(text, r=3, lora_alpha=3, target_modules=["q_proj"])
    folder = case("diffusers-plain")
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=state_of(model), text_encoder_lora_layers=state_of(text)
    )
    save_expected(folder, deltas(model, "unet.") | deltas(text, "text_encoder."))


def layers() -> None:
    """``to_q.lora.down`` and ``q_proj.lora_linear_layer.down``, by diffusers' own renaming."""
    model, text = unet(), text_encoder()
    adapt(model, r=2, lora_alpha=2, target_modules=["attn2.to_q", "attn2.to_out.0"])
    adapt(text, r=3, lora_alpha=3, target_modules=["q_proj", "out_proj"])
    folder = case("diffusers-layers")
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=convert_state_dict_to_diffusers(state_of(model)),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(state_of(text)),
    )  # fmt: skip
    save_expected(folder, deltas(model, "unet.") | deltas(text, "text_encoder."))


def random(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def product(B: np.ndarray, A: np.ndarray, scale: float = 1.0) -> np.ndarray:
    return scale * (B.astype(np.float64) @ A.astype(np.float64))


def processors() -> None:
    """The attention processors of diffusers 0.12 to 0.17, as `sd15-diffusers-processor` has them."""
    tensors, expected = {}, {}
    names = {f"{ATTN}.processor.to_{part}_lora": f"unet.{ATTN}.to_{part}" for part in "qkv"}
    names[f"{ATTN}.processor.to_out_lora"] = f"unet.{ATTN}.to_out.0"
    names[f"text_encoder.{TEXT}.to_v_lora"] = f"text_encoder.{TEXT}.v_proj"
    names[f"text_encoder.{TEXT}.to_out_lora"] = f"text_encoder.{TEXT}.out_proj"
    for i, (stored, name) in enumerate(names.items()):
        A, B = random(2, 5, seed=i), random(6, 2, seed=i + 10)
        tensors |= {f"{stored}.down.weight": A, f"{stored}.up.weight": B}
        expected[name] = product(B, A)
    save_raw(case("diffusers-processors"), tensors, {"format": "pt"})
    save_expected(case("diffusers-processors"), expected)


def other_trainers() -> None:
    """A FLUX file with ``alpha`` tensors, ai-toolkit's without, and Mochi's keys without ``.weight``."""
    names = [f"transformer.single_transformer_blocks.{i}.attn.to_q" for i in range(2)]
    B, A = random(6, 2, seed=1), random(2, 5, seed=2)
    for case_, leaf, alphas, metadata in (
        ("diffusers-alpha", ".weight", (6.0, 0.5), {"format": "pt"}),
        ("diffusers-aitoolkit", ".weight", (), {"format": "pt", "software": json.dumps({"name": "ai-toolkit"})}),
        ("diffusers-mochi", "", (), None),
    ):
        tensors = {f"{name}.lora_A{leaf}": (i + 1) * A for i, name in enumerate(names)}
        tensors |= {f"{name}.lora_B{leaf}": B for name in names}
        tensors |= {f"{name}.alpha": np.float32(alpha) for name, alpha in zip(names, alphas, strict=False)}
        save_raw(case(case_), {key: np.asarray(tensor) for key, tensor in tensors.items()}, metadata)
        scales = [alpha / 2 for alpha in alphas] or [1.0, 1.0]
        save_expected(case(case_), {name: product(B, (i + 1) * A, scales[i]) for i, name in enumerate(names)})


if __name__ == "__main__":
    for make in (saved_by_a_model, saved_by_a_pipeline, saved_without_header, layers, processors, other_trainers):
        make()
    for file in HERE.glob("diffusers-*/*.safetensors"):
        file.chmod(0o644)
