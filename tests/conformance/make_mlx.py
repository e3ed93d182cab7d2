"""Tiny mlx-lm adapters, saved and fused by mlx-lm itself (0.32.2 on mlx 0.32.4).

Run by hand: ``pip install --no-deps mlx mlx-cpu mlx-lm`` (somewhere else than in the environment of the tests), then
``python tests/conformance/make_mlx.py``. All numbers are eighths, so that float32 products are exact.
"""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from safetensors.numpy import save_file

HERE = Path(__file__).parent
rng = np.random.default_rng(11)


def drawn(shape):
    return mx.array(rng.integers(-8, 9, shape).astype(np.float32) / 8)


def filled(layer):
    """A LoRA layer with drawn factors around a base weight of zeros: fused, the weight is ΔW."""
    layer.lora_a, layer.lora_b = drawn(layer.lora_a.shape), drawn(layer.lora_b.shape)
    inner = layer.embedding if hasattr(layer, "embedding") else layer.linear
    inner.weight = mx.zeros(inner.weight.shape)
    return layer


def delta(layer):
    return np.array(layer.fuse().weight).astype(np.float64)


def save(case, layers, config, expected):
    folder = HERE / case
    folder.mkdir(exist_ok=True)
    weights = {
        f"{name}.{leaf}": value
        for name, layer in layers.items()
        for leaf, value in tree_flatten(layer.parameters())
        if leaf in ("lora_a", "lora_b", "m")
    }
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=4))
    save_file({name: np.ascontiguousarray(array) for name, array in expected.items()}, folder / "expected.safetensors")


def config(kind, scale):
    parameters = {"rank": 2, "scale": scale, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    return {"fine_tune_type": kind, "lora_parameters": parameters, "model": "tiny/base", "num_layers": 1}


def lora():
    """A linear layer, a square one, an embedding (stored as its transpose's update), three experts."""
    layers = {
        "model.layers.0.self_attn.q_proj": filled(LoRALinear.from_base(nn.Linear(4, 6), r=2, scale=10.0)),
        "model.layers.0.self_attn.o_proj": filled(LoRALinear.from_base(nn.Linear(4, 4), r=2, scale=10.0)),
        "model.embed_tokens": filled(LoRAEmbedding.from_base(nn.Embedding(7, 4), r=2, scale=10.0)),
        "model.layers.0.mlp.switch_mlp.up_proj": filled(
            LoRASwitchLinear.from_base(SwitchLinear(4, 6, 3, bias=False), r=2, scale=10.0)
        ),
    }
    expected = {}
    for name, layer in layers.items():
        fused = delta(layer)
        if fused.ndim == 3:
            expected.update({f"{name}[{e}]": fused[e] for e in range(len(fused))})
        else:
            expected[name] = fused.T if "embed" in name else fused
    save("mlx-lora", layers, config("lora", 10.0), expected)


def flat_experts():
    """Experts as mlx-lm stored them before 2025, lora_a in two dimensions: it still fuses these."""
    layer = filled(LoRASwitchLinear.from_base(SwitchLinear(4, 6, 3, bias=False), r=2, scale=0.5))
    fused = delta(layer)
    layer.lora_a = layer.lora_a.reshape(6, 4)
    assert np.array_equal(delta(layer), fused)
    name = "model.layers.1.mlp.switch_mlp.down_proj"
    save("mlx-experts-flat", {name: layer}, config("lora", 0.5), {f"{name}[{e}]": fused[e] for e in range(3)})


def dora():
    """DoRA of a linear layer and of an embedding: m by the rows of each weight; ΔW is what m is applied to."""
    linear = DoRALinear.from_base(nn.Linear(4, 6, bias=False), r=2, scale=20.0)
    table = DoRAEmbedding.from_base(nn.Embedding(7, 4), r=2, scale=20.0)
    layers, expected = {"model.layers.0.self_attn.q_proj": linear, "model.embed_tokens": table}, {}
    for name, layer in layers.items():
        layer.lora_a, layer.lora_b = drawn(layer.lora_a.shape), drawn(layer.lora_b.shape)
        a, b = np.array(layer.lora_a, np.float64), np.array(layer.lora_b, np.float64)
        expected[name] = 20.0 * (a @ b).T
    save("mlx-dora", layers, config("dora", 20.0), expected)


mx.random.seed(0)
lora()
flat_experts()
dora()
