"""Tiny kohya files in the names of sd-scripts, and ΔW by the formula: sd-scripts is no package, so numpy writes it out.

Run by hand: ``python tests/conformance/make_kohya.py``.
"""

from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
rng = np.random.default_rng(7)


def drawn(*shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def number(value, dtype=np.float32):
    return np.array(value, dtype)


def times(up, down, scale):
    """scale · Σ_r up[o, r] down[r, i, k…] as (out, in · k…)."""
    B = up.astype(np.float64).reshape(len(up), -1)
    return scale * (B @ down.astype(np.float64).reshape(len(down), -1))


def sdxl():
    """Two text encoders and a UNet; ranks and α mixed; a convolution; α in float16; bfloat16 factors."""
    up, down = drawn(6, 2), drawn(2, 4)
    te1_up, te1_down = drawn(4, 1), drawn(1, 6)
    conv_up, conv_down = drawn(6, 3, 1, 1), drawn(3, 2, 3, 3)
    half_up, half_down = drawn(6, 2, dtype=ml_dtypes.bfloat16), drawn(2, 4, dtype=ml_dtypes.bfloat16)
    names = {
        "q": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "conv": "lora_unet_input_blocks_1_0_in_layers_2",
        "te1": "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "te2": "lora_te2_text_model_encoder_layers_10_mlp_fc1",
    }
    tensors = {
        f"{names['q']}.alpha": number(8.0),
        f"{names['q']}.lora_down.weight": down,
        f"{names['q']}.lora_up.weight": up,
        f"{names['conv']}.alpha": number(1.5),
        f"{names['conv']}.lora_down.weight": conv_down,
        f"{names['conv']}.lora_up.weight": conv_up,
        f"{names['te1']}.alpha": number(0.5, np.float16),
        f"{names['te1']}.lora_down.weight": te1_down,
        f"{names['te1']}.lora_up.weight": te1_up,
        f"{names['te2']}.alpha": number(7, np.int64),
        f"{names['te2']}.lora_down.weight": half_down,
        f"{names['te2']}.lora_up.weight": half_up,
    }
    expected = {
        names["q"]: times(up, down, 4.0),
        names["conv"]: times(conv_up, conv_down, 0.5),
        names["te1"]: times(te1_up, te1_down, 0.5),
        names["te2"]: times(half_up, half_down, 3.5),
    }
    return tensors, expected


def glued():
    """A prefix twice, a leaf behind an underscore, no α: scale 1."""
    up, down = drawn(6, 2), drawn(2, 4)
    name = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
    tensors = {
        f"lora_unet_unet_{name}_lora_down.weight": down,
        f"lora_unet_unet_{name}_lora_up.weight": up,
    }
    return tensors, {f"lora_unet_{name}": times(up, down, 1.0)}


def split_qkv():
    """FLUX trained with split_qkv: three pairs of rank 2 as one of 6; α/r by the rows of lora_down."""
    downs, ups = [drawn(2, 4) for _ in range(3)], [drawn(3, 2) for _ in range(3)]
    up = np.zeros((9, 6), np.float32)
    for i in range(3):
        up[3 * i : 3 * i + 3, 2 * i : 2 * i + 2] = ups[i]
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{name}.lora_down.weight": np.concatenate(downs),
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": number(3.0),
    }
    return tensors, {name: np.concatenate([times(ups[i], downs[i], 0.5) for i in range(3)])}


CASES = {"kohya-sdxl": sdxl, "kohya-glued": glued, "kohya-split-qkv": split_qkv}


def main():
    for case, make in CASES.items():
        tensors, expected = make()
        folder = HERE / case
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        save_file(expected, folder / "expected.safetensors")
        for file in folder.iterdir():
            file.chmod(0o644)


if __name__ == "__main__":
    main()
