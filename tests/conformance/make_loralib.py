"""Tiny loralib state dicts, saved and merged by loralib itself (0.1.2).

Run by hand: ``pip install loralib``, then ``python tests/conformance/make_loralib.py``. A layer around a base weight of
zeros, put in eval mode, holds ΔW in its weight. All numbers are eighths, so that float32 products are exact.
"""

import json
from pathlib import Path

import loralib
import numpy as np
import torch
from safetensors.numpy import save_file

HERE = Path(__file__).parent
rng = np.random.default_rng(13)


def filled(layer):
    for factor in (layer.lora_A, layer.lora_B):
        factor.data = torch.from_numpy(rng.integers(-8, 9, factor.shape).astype(np.float32) / 8)
    inner = layer.conv if hasattr(layer, "conv") else layer
    inner.weight.data.zero_()
    return layer


def delta(layer):
    layer.eval()
    weight = (layer.conv if hasattr(layer, "conv") else layer).weight.detach().numpy().astype(np.float64)
    layer.train()
    return weight


def save(case, state, expected, *, config=None, load='{"alpha": 16}'):
    folder = HERE / case
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "adapter_model.bin")
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(array) for name, array in expected.items()}, folder / "expected.safetensors")
    (folder / "load.json").write_text(load + "\n")


def modules(**layers):
    return torch.nn.ModuleDict(layers)


def plain():
    """Linear, one stored (in, out), Embedding, a head beside them, biases."""
    model = modules(
        query=filled(loralib.Linear(4, 6, r=2, lora_alpha=16)),
        c_proj=filled(loralib.Linear(6, 4, r=2, lora_alpha=16, fan_in_fan_out=True)),
        embed_tokens=filled(loralib.Embedding(7, 4, r=2, lora_alpha=16)),
        classifier=torch.nn.Linear(4, 3),
    )
    for ones in (model.classifier.weight, model.query.bias, model.c_proj.bias, model.classifier.bias):
        torch.nn.init.ones_(ones)
    expected = {
        "query": delta(model.query),
        "c_proj": delta(model.c_proj).T,
        "embed_tokens": delta(model.embed_tokens).T,
    }
    state = loralib.lora_state_dict(model, bias="all")
    state["classifier.weight"] = model.classifier.weight.detach()
    save("loralib-plain", state, expected)


def merged(case, enabled, **options):
    layer = filled(loralib.MergedLinear(4, 6, r=2, lora_alpha=16, enable_lora=enabled, **options))
    model = modules(c_attn=layer, c_proj=filled(loralib.Linear(6, 4, r=2, lora_alpha=16)))
    fused = delta(layer)
    expected = {"c_attn": fused.T if options else fused, "c_proj": delta(model.c_proj)}
    save(case, loralib.lora_state_dict(model), expected, config={"enable_lora": enabled})


def conv():
    """Conv2d of a kernel 3, with its own weight and bias beside, and one of kernel 1."""
    model = modules(
        wide=filled(loralib.Conv2d(2, 6, 3, r=2, lora_alpha=16)),
        narrow=filled(loralib.Conv2d(4, 6, 1, r=2, lora_alpha=16)),
    )
    expected = {name: delta(layer).reshape(6, -1) for name, layer in model.named_children()}
    save("loralib-conv", model.state_dict(), expected, load='{"scale": 8.0}')


torch.manual_seed(0)  # of the biases
plain()
merged("loralib-merged", [True, False, True])
merged("loralib-merged-all", [True, True, True], fan_in_fan_out=True)
conv()
