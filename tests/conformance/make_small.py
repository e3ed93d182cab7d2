"""Tiny torchtune, LitGPT, safeloras and plain files.

ΔW of LitGPT's layers comes from LitGPT itself (0.5.13); of the others from their formula, written out, as they are
no packages any more or do not install here. Run by hand: ``pip install --no-deps litgpt lightning lightning-utilities
torchmetrics`` (somewhere else than in the environment of the tests), then ``python tests/conformance/make_small.py``.
All numbers are eighths, so that float32 products are exact.
"""

import json
from pathlib import Path

import numpy as np
import torch
from litgpt.lora import LoRALinear, LoRAQKVLinear
from safetensors.numpy import save_file

HERE = Path(__file__).parent
rng = np.random.default_rng(17)


def drawn(*shape):
    return rng.integers(-8, 9, shape).astype(np.float32) / 8


def save(case, tensors, expected, load, *, config=None, metadata=None, wrap=None, pickled=False):
    folder = HERE / case
    folder.mkdir(exist_ok=True)
    if pickled:
        state = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in tensors.items()}
        torch.save({wrap: state} if wrap else state, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors", metadata)
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if load:
        (folder / "load.json").write_text(json.dumps(load) + "\n")
    save_file({name: np.ascontiguousarray(array) for name, array in expected.items()}, folder / "expected.safetensors")


def torchtune():
    """x ↦ x W ᵀ + α/r · (x aᵀ) bᵀ; experts x ↦ x W + α/r · (x a) b; a DoRA magnitude."""
    q, v, experts = "layers.0.attn.q_proj", "layers.0.attn.v_proj", "layers.0.mlp.experts"
    tensors = {f"{q}.lora_a.weight": drawn(2, 4), f"{q}.lora_b.weight": drawn(6, 2), f"{q}.magnitude": drawn(6)}
    tensors |= {f"{v}.lora_a.weight": drawn(2, 4), f"{v}.lora_b.weight": drawn(4, 2)}
    tensors |= {f"{experts}.lora_gate_a": drawn(3, 4, 2), f"{experts}.lora_gate_b": drawn(3, 2, 6)}
    tensors |= {f"{experts}.lora_down_a": drawn(3, 6, 2), f"{experts}.lora_down_b": drawn(3, 2, 4)}
    wide = {key: array.astype(np.float64) for key, array in tensors.items()}
    expected = {}
    for name in (q, v):
        x = np.eye(4)
        expected[name] = (8.0 * (x @ wide[f"{name}.lora_a.weight"].T) @ wide[f"{name}.lora_b.weight"].T).T
    for which in ("gate", "down"):
        for e in range(3):
            a, b = wide[f"{experts}.lora_{which}_a"][e], wide[f"{experts}.lora_{which}_b"][e]
            x = np.eye(len(a))
            expected[f"{experts}.{which}_proj[{e}]"] = (8.0 * (x @ a) @ b).T
    save("torchtune", tensors, expected, {"alpha": 16}, pickled=True)


def layer(make, **options):
    found = make(4, options.pop("out"), r=2, lora_alpha=16, **options)
    for factor in (found.lora_A, found.lora_B):
        factor.data = torch.from_numpy(drawn(*factor.shape))
    return found


def state(name, found):
    return {f"{name}.lora_A": found.lora_A.detach().numpy(), f"{name}.lora_B": found.lora_B.detach().numpy()}


def litgpt(case, heads, groups, enabled, config):
    """LitGPT's own ΔW of a fused projection (heads of 2 rows) and of the output projection beside it."""
    shape = {"head_size": 2, "n_head": heads, "n_query_groups": groups}
    qkv = layer(LoRAQKVLinear, out=2 * (heads + 2 * groups), enable_lora=enabled, **shape)
    fc = layer(LoRALinear, out=6)
    names = {"transformer.h.0.attn.qkv": qkv, "transformer.h.0.mlp.fc_1": fc}
    tensors = {key: array for name, found in names.items() for key, array in state(name, found).items()}
    expected = {name: found.get_lora_AB().detach().numpy().astype(np.float64) for name, found in names.items()}
    save(case, tensors, expected, {"alpha": 16}, config=config and {**shape, **config}, wrap="model", pickled=True)


def litgpt_old():
    """attn.attn before 0.5: the rows of a group of heads (its queries, its key, its value) lie side by side."""
    heads, groups, size = 4, 2, 2
    A, B = drawn(4, 4), drawn(heads * size + groups * size, 2)
    expected = np.zeros((groups, heads // groups + 2, size, 4))
    query = 8.0 * B[: heads * size].astype(np.float64) @ A[:2]
    value = 8.0 * B[heads * size :].astype(np.float64) @ A[2:]
    expected[:, : heads // groups] = query.reshape(groups, heads // groups, size, 4)
    expected[:, -1] = value.reshape(groups, size, 4)
    name = "transformer.h.3.attn.attn"
    config = {"enable_lora": [True, False, True], "n_head": heads, "n_query_groups": groups, "head_size": size}
    tensors = {f"{name}.lora_A": A, f"{name}.lora_B": B}
    save(
        "litgpt-old", tensors, {name: expected.reshape(-1, 4)}, {"alpha": 16}, config=config, wrap="model", pickled=True
    )


def safeloras():
    """W + up @ down; numbers in the order of a sort that is not the alphabet's; two new tokens; a convolution."""
    tensors, expected = {"<s1>": drawn(4), "<s2>": drawn(4)}, {}
    metadata = {"unet": '["CrossAttention"]', "text_encoder": '["CLIPAttention"]', "<s1>": "<embed>", "<s2>": "<embed>"}
    for key, out, in_ in (("unet:0", 6, 4), ("unet:2", 4, 4), ("unet:10", 4, 6), ("text_encoder:0", 6, 4)):
        up, down = drawn(out, 1), drawn(1, in_)
        tensors |= {f"{key}:up": up, f"{key}:down": down}
        metadata[f"{key}:rank"] = "1"
        expected[key.replace(":", ".")] = up.astype(np.float64) @ down
    up, down = drawn(6, 2, 1, 1), drawn(2, 4, 3, 3)
    tensors |= {"unet:11:up": up, "unet:11:down": down}
    expected["unet.11"] = np.einsum("or,rikl->oikl", up[:, :, 0, 0].astype(np.float64), down).reshape(6, -1)
    save("safeloras", tensors, expected, {}, metadata=metadata)


def plain():
    """w_b (w_a x)."""
    tensors, expected = {}, {}
    for number in range(3):
        a, b = drawn(2, 4), drawn(6, 2)
        tensors |= {f"w_a_{number:03d}": a, f"w_b_{number:03d}": b}
        expected[f"w_{number:03d}"] = b.astype(np.float64) @ a
    save("plain-pairs", tensors, expected, {})


torchtune()
litgpt("litgpt", 2, 2, (True, False, True), {"lora_query": True, "lora_key": False, "lora_value": True})
litgpt("litgpt-grouped", 4, 2, (True, True, True), {"enable_lora": [True, True, True]})
litgpt_old()
safeloras()
plain()
