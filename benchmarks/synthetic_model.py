"""Four blocks of a 7B Llama in two shards of bf16, 1.6 GB, and an adapter of rank 16 on all its linear layers."""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from benchmarks.synthetic import HIDDEN, INNER, LINEAR

BLOCKS, VOCABULARY, RANK = 4, 256, 16
RELATIVE = 0.01  # ‖ΔW‖/‖W‖
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": VOCABULARY,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


def model(folder: Path) -> None:
    """Write the model, unless the folder already has it."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng, names = np.random.default_rng(0), {}
    for shard in (0, 1):
        name = f"model-0000{shard + 1}-of-00002.safetensors"
        tensors = {}
        for block in (2 * shard, 2 * shard + 1):
            stem = f"model.layers.{block}"
            for kind, (out, in_) in LINEAR.items():
                tensors[f"{stem}.{kind}.weight"] = _weights(rng, out, in_)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{stem}.{norm}.weight"] = np.ones(HIDDEN, ml_dtypes.bfloat16)
        ends = ("lm_head.weight", "model.embed_tokens.weight")
        tensors[ends[shard]] = _weights(rng, VOCABULARY, HIDDEN)
        if shard:
            tensors["model.norm.weight"] = np.ones(HIDDEN, ml_dtypes.bfloat16)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, name)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}, indent=2))


def adapter(folder: Path) -> None:
    """Write the adapter, unless the folder already has it."""
    file = folder / "adapter_model.safetensors"
    if file.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng, tensors = np.random.default_rng(1), {}
    size = RELATIVE * 0.02 / RANK**0.5
    for block in range(BLOCKS):
        for kind, (out, in_) in LINEAR.items():
            key = f"base_model.model.model.layers.{block}.{kind}"
            tensors[f"{key}.lora_A.weight"] = rng.standard_normal((RANK, in_), np.float32)
            tensors[f"{key}.lora_B.weight"] = rng.standard_normal((out, RANK), np.float32) * np.float32(size)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [n.split(".")[1] for n in LINEAR]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, file, metadata={"format": "pt"})


def _weights(rng: np.random.Generator, out: int, in_: int) -> NDArray[ml_dtypes.bfloat16]:
    return (rng.standard_normal((out, in_), np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)


if __name__ == "__main__":
    model(Path(sys.argv[1]) / "llama-4-blocks")
    adapter(Path(sys.argv[1]) / "llama-4-blocks-r16")
