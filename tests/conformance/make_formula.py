"""Makes the conformance folders of dialects whose software is no package (kohya, ComfyUI, XLabs): ΔW by the formula.

Run by hand: ``python tests/conformance/make_formula.py``. sd-scripts and ComfyUI add α/r · up @ down, and up @ down
where there is no α. XLabs' trainer adds up @ down to the projections and to q, k and v, which are the first 3·h rows
of a single block's linear1 (7·h rows in all). Nothing here imports loralens.
"""

from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent


def random(*shape, seed, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def times(up, down, alpha=None):
    """α/r · Σ_r up[o, r] down[r, i, k…] as (out, in · k…), float64."""
    B, A = (array.astype(np.float64).reshape(len(array), -1) for array in (up, down))
    return (1.0 if alpha is None else alpha / len(A)) * (B @ A)


def save(file, tensors, expected, metadata=None):
    path = HERE / file
    path.parent.mkdir(exist_ok=True)
    save_file({key: np.asarray(tensor) for key, tensor in tensors.items()}, path, metadata)
    save_file(expected, path.parent / "expected.safetensors")
    for each in path.parent.iterdir():
        each.chmod(0o644)


def kohya():
    rng = np.random.default_rng(7)

    def drawn(*shape, dtype=np.float32):
        return rng.standard_normal(shape).astype(dtype)

    # Two text encoders and a UNet; ranks, α and their dtypes mixed; a convolution; bfloat16 factors.
    tensors, expected = {}, {}
    for name, up_shape, down_shape, alpha, dtype in (
        ("unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", (6, 2), (2, 4), np.float32(8), np.float32),
        ("te1_text_model_encoder_layers_0_mlp_fc1", (4, 1), (1, 6), np.float16(0.5), np.float32),
        ("unet_input_blocks_1_0_in_layers_2", (6, 3, 1, 1), (3, 2, 3, 3), np.float32(1.5), np.float32),
        ("te2_text_model_encoder_layers_10_mlp_fc1", (6, 2), (2, 4), np.int64(7), ml_dtypes.bfloat16),
    ):
        up, down = drawn(*up_shape, dtype=dtype), drawn(*down_shape, dtype=dtype)
        name = f"lora_{name}"
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": alpha}
        expected[name] = times(up, down, float(alpha))
    save("kohya-sdxl/adapter_model.safetensors", tensors, expected)

    # A prefix twice, a leaf behind an underscore, no α.
    up, down = drawn(6, 2), drawn(2, 4)
    name = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
    tensors = {f"lora_unet_unet_{name}_lora_{half}.weight": array for half, array in (("down", down), ("up", up))}
    save("kohya-glued/adapter_model.safetensors", tensors, {f"lora_unet_{name}": times(up, down)})

    # FLUX trained with split_qkv: three pairs of rank 2 as one of 6; α/r by the rows of lora_down.
    downs, ups = [drawn(2, 4) for _ in range(3)], [drawn(3, 2) for _ in range(3)]
    up, down = np.zeros((9, 6), np.float32), np.concatenate(downs)
    for i in range(3):
        up[3 * i : 3 * i + 3, 2 * i : 2 * i + 2] = ups[i]
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": np.float32(3)}
    expected = {name: np.concatenate([times(ups[i], downs[i], 1) for i in range(3)])}
    save("kohya-split-qkv/adapter_model.safetensors", tensors, expected)


def comfyui():
    # float16 with alpha, full differences of a norm and of biases beside the pairs.
    tensors, expected = {"diffusion_model.blocks.0.norm3.diff": random(6, seed=30)}, {}
    for i, part in enumerate("qkv"):
        name = f"diffusion_model.blocks.0.self_attn.{part}"
        up, down = random(6, 2, seed=i, dtype=np.float16), random(2, 4, seed=i + 9, dtype=np.float16)
        alpha = np.float16(0.7 * (i + 1))
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": alpha}
        tensors[f"{name}.diff_b"] = random(6, seed=20 + i)
        expected[name] = times(up, down, float(alpha))
    save("comfyui-wan/lora.safetensors", tensors, expected, {"format": "pt"})

    # ai-toolkit's and Qwen's keys: no alpha, the adapter's name left in some, a text encoder, a reshaped weight.
    tensors, expected = {"diffusion_model.img_in.reshape_weight": np.array([6, 4])}, {}
    for i, (name, end) in enumerate({
        "diffusion_model.double_blocks.0.img_attn.qkv": ".weight",
        "diffusion_model.img_in": ".default.weight",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q": "",
    }.items()):  # fmt: skip
        B, A = random(6, 2, seed=i), random(2, 4, seed=i + 9)
        tensors |= {f"{name}.lora_B{end}": B, f"{name}.lora_A{end}": A}
        expected[name] = times(B, A)
    save("comfyui-ab/lora.safetensors", tensors, expected, {"format": "pt"})

    # diffusers' names as ComfyUI maps them, and a convolution.
    tensors, expected, attn = {}, {}, "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    for i, (stored, name) in enumerate(
        ((f"{attn}.processor.to_q", f"{attn}.to_q"), (f"{attn}.processor.to_out", f"{attn}.to_out.0"), ("conv_in",) * 2)
    ):
        kernel = (3, 3) if name == "conv_in" else ()
        up, down = random(6, 2, *(1 for _ in kernel), seed=i), random(2, 4, *kernel, seed=i + 9)
        tensors |= {f"unet.{stored}.lora_up.weight": up, f"unet.{stored}.lora_down.weight": down}
        tensors[f"unet.{stored}.alpha"] = np.float32(3)
        expected[f"unet.{name}"] = times(up, down, 3.0)
    save("comfyui-unet/lora.safetensors", tensors, expected, {"format": "pt"})


def xlabs():
    tensors, expected = {}, {}
    for seed, (key, name, rows, inputs, out) in enumerate((
        ("double_blocks.0.processor.qkv_lora1", "double_blocks.0.img_attn.qkv", 12, 4, 12),
        ("double_blocks.0.processor.qkv_lora2", "double_blocks.0.txt_attn.qkv", 12, 4, 12),
        ("double_blocks.0.processor.proj_lora1", "double_blocks.0.img_attn.proj", 4, 4, 4),
        ("double_blocks.0.processor.proj_lora2", "double_blocks.0.txt_attn.proj", 4, 4, 4),
        ("single_blocks.1.processor.qkv_lora", "single_blocks.1.linear1", 12, 4, 28),
        ("single_blocks.1.processor.proj_lora", "single_blocks.1.linear2", 4, 20, 4),
    )):  # fmt: skip
        rng = np.random.default_rng(seed)
        up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, 2), (2, inputs)))
        tensors |= {f"{key}.up.weight": up, f"{key}.down.weight": down}
        expected[name] = np.zeros((out, inputs))
        expected[name][:rows] = times(up, down)
    save("xlabs/lora.safetensors", tensors, expected)


kohya()
comfyui()
xlabs()
