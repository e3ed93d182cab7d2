"""The names of whole models: what transformers stores, named by llama.cpp's tables, comes back under the same keys."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loralens.formats import open_checkpoint
from tests import ggufs
from tests.architectures import HEADS, PLAIN, TEXT
from tests.formats.files import model_config

pytestmark = pytest.mark.slow

# Architecture of llama.cpp → class of the configuration in transformers, and its fields.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", TEXT),
    "granite": ("GraniteConfig", TEXT),
    "smollm3": ("SmolLM3Config", TEXT),
    "arcee": ("ArceeConfig", TEXT),
    "olmo": ("OlmoConfig", TEXT),
    "qwen2": ("Qwen2Config", TEXT),
    "qwen3": ("Qwen3Config", HEADS),
    "gemma": ("GemmaConfig", HEADS),
    "gemma2": ("Gemma2Config", HEADS),
    "gemma3": ("Gemma3TextConfig", HEADS),
    "phi3": ("Phi3Config", TEXT),
    "phi2": ("PhiConfig", PLAIN),
    "starcoder2": ("Starcoder2Config", {**TEXT, "use_bias": True}),
    "stablelm": ("StableLmConfig", TEXT),
    "command-r": ("CohereConfig", TEXT),
    "cohere2": ("Cohere2Config", TEXT),
    "olmo2": ("Olmo2Config", TEXT),
    "seed_oss": ("SeedOssConfig", HEADS),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 32}),
    "bert": ("BertConfig", PLAIN),
}


@pytest.mark.usefixtures("quiet_torch")
@pytest.mark.parametrize("arch", FAMILIES)
def test_every_tensor_of_a_family_comes_back(arch: str, tmp_path: Path) -> None:
    import torch
    import transformers

    name, fields = FAMILIES[arch]
    made = transformers.AutoModel if arch == "bert" else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = made.from_config(getattr(transformers, name)(**fields))
    rng = np.random.default_rng(0)
    weights = {}
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    tied = model.config.tie_word_embeddings
    for key, shape in shapes.items():
        # Tied heads, buffers and what llama.cpp's converter leaves out.
        if (key == "lm_head.weight" and tied) or "pooler" in key or key.endswith((".attn.bias", "position_ids")):
            continue
        turned = arch == "gpt2" and ".h." in key and len(shape) == 2
        weights[key] = rng.standard_normal(shape[::-1] if turned else shape).astype(np.float32)
    heads = (4, 4 if "num_key_value_heads" not in fields else 2)
    numbers = ggufs.write(tmp_path / "m.gguf", weights, arch=arch, kinds=dict.fromkeys(weights, "F32"), heads=heads)
    found = open_checkpoint(tmp_path / "m.gguf").tensors
    assert found.keys() == numbers.keys()
    for key, tensor in found.items():
        np.testing.assert_array_equal(tensor.read(), numbers[key], err_msg=key)
    config = model_config(tmp_path / "m.gguf")
    assert config is not None
    assert config["model_type"] in (model.config.model_type, "bert")
    assert config["vocab_size"] == 40
