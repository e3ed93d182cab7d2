"""Makes the conformance folders comfyui-*: ComfyUI's names, and ΔW by the formula of its ``LoRAAdapter``, literally.

Run by hand: ``python -m tests.conformance.make_comfyui``. ComfyUI is no package to install, so what it computes is
written out: ``alpha / down.shape[0] * up.flatten(1) @ down.flatten(1)``, 1 for alpha / rank where there is none.
Nothing here imports loralens.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
Arrays = dict[str, np.ndarray]


def random(*shape: int, seed: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def delta(up: np.ndarray, down: np.ndarray, alpha: float | None = None) -> np.ndarray:
    """ΔW in float64, (out, in·k…)."""
    up, down = up.astype(np.float64), down.astype(np.float64)
    scale = 1.0 if alpha is None else alpha / down.shape[0]
    return scale * (up.reshape(len(up), -1) @ down.reshape(len(down), -1))


def wan() -> tuple[Arrays, Arrays]:
    """float16 with alpha, full differences of a norm and of biases beside the pairs."""
    tensors, expected = {}, {}
    for i, part in enumerate("qkv"):
        name = f"diffusion_model.blocks.0.self_attn.{part}"
        up, down = random(6, 2, seed=i, dtype=np.float16), random(2, 4, seed=i + 9, dtype=np.float16)
        alpha = np.float16(0.7 * (i + 1))
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": np.asarray(alpha)}
        tensors[f"{name}.diff_b"] = random(6, seed=20 + i)
        expected[name] = delta(up, down, float(alpha))
    tensors["diffusion_model.blocks.0.norm3.diff"] = random(6, seed=30)
    return tensors, expected


def a_and_b() -> tuple[Arrays, Arrays]:
    """ai-toolkit's and Qwen's keys: no alpha, the adapter's name left in some, a text encoder, a reshaped weight."""
    names = {
        "diffusion_model.double_blocks.0.img_attn.qkv": ".weight",
        "diffusion_model.img_in": ".default.weight",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q": "",
    }
    tensors, expected = {}, {}
    for i, (name, end) in enumerate(names.items()):
        B, A = random(6, 2, seed=i), random(2, 4, seed=i + 9)
        tensors |= {f"{name}.lora_B{end}": B, f"{name}.lora_A{end}": A}
        expected[name] = delta(B, A)
    tensors["diffusion_model.img_in.reshape_weight"] = np.array([6, 4])
    return tensors, expected


def unet() -> tuple[Arrays, Arrays]:
    """diffusers' names as ComfyUI maps them, and a convolution."""
    tensors, expected = {}, {}
    attn = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    for i, (stored, name) in enumerate(
        ((f"{attn}.processor.to_q", f"{attn}.to_q"), (f"{attn}.processor.to_out", f"{attn}.to_out.0"), ("conv_in",) * 2)
    ):
        kernel = (3, 3) if name == "conv_in" else ()
        up, down = random(6, 2, *(1 for _ in kernel), seed=i), random(2, 4, *kernel, seed=i + 9)
        tensors |= {f"unet.{stored}.lora_up.weight": up, f"unet.{stored}.lora_down.weight": down}
        tensors[f"unet.{stored}.alpha"] = np.asarray(np.float32(3))
        expected[f"unet.{name}"] = delta(up, down, 3.0)
    return tensors, expected


if __name__ == "__main__":
    for case, make in {"comfyui-wan": wan, "comfyui-ab": a_and_b, "comfyui-unet": unet}.items():
        tensors, expected = make()
        folder = HERE / case
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "lora.safetensors", {"format": "pt"})
        save_file(expected, folder / "expected.safetensors")
        for file in folder.iterdir():
            file.chmod(0o644)
