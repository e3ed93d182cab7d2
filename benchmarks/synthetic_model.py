"""Four blocks of a 7B Llama in two shards of bf16, 1.6 GB, and an adapter of rank 16 on all its linear layers.

A tiny model and adapter of the same form serve tests, and runs that only load a program.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from benchmarks.synthetic import HIDDEN, INNER, LINEAR

BLOCKS, VOCABULARY, RANK = 4, 256, 16
RELATIVE = 0.01  # ‖ΔW‖/‖W‖


@dataclass(frozen=True)
class Size:
    """The widths of a Llama of four blocks."""

    hidden: int = HIDDEN
    inner: int = INNER

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Name of a linear layer in its block → outputs and inputs."""
        widths = {HIDDEN: self.hidden, INNER: self.inner}
        return {kind: (widths[out], widths[in_]) for kind, (out, in_) in LINEAR.items()}

    @property
    def config(self) -> dict[str, Any]:
        """What transformers needs to know of it."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
            "intermediate_size": self.inner, "num_hidden_layers": BLOCKS, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": VOCABULARY, "torch_dtype": "bfloat16",
            "tie_word_embeddings": False,
        }  # fmt: skip


SEVEN_B = Size()
TINY = Size(256, 512)  # blocks of Q4_K have 256 numbers


def model(folder: Path, size: Size = SEVEN_B) -> None:
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
            for kind, (out, in_) in size.linear.items():
                tensors[f"{stem}.{kind}.weight"] = _weights(rng, out, in_)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{stem}.{norm}.weight"] = np.ones(size.hidden, ml_dtypes.bfloat16)
        ends = ("lm_head.weight", "model.embed_tokens.weight")
        tensors[ends[shard]] = _weights(rng, VOCABULARY, size.hidden)
        if shard:
            tensors["model.norm.weight"] = np.ones(size.hidden, ml_dtypes.bfloat16)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, name)
    (folder / "config.json").write_text(json.dumps(size.config, indent=2))
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}, indent=2))


def adapter(folder: Path, size: Size = SEVEN_B) -> None:
    """Write the adapter, unless the folder already has it."""
    file = folder / "adapter_model.safetensors"
    if file.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng, tensors = np.random.default_rng(1), {}
    scale = RELATIVE * 0.02 / RANK**0.5
    for block in range(BLOCKS):
        for kind, (out, in_) in size.linear.items():
            key = f"base_model.model.model.layers.{block}.{kind}"
            tensors[f"{key}.lora_A.weight"] = rng.standard_normal((RANK, in_), np.float32)
            tensors[f"{key}.lora_B.weight"] = rng.standard_normal((out, RANK), np.float32) * np.float32(scale)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [n.split(".")[1] for n in LINEAR]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, file, metadata={"format": "pt"})


def make_tiny(folder: Path) -> tuple[Path, Path]:
    """The folders of a tiny model and its adapter."""
    made = folder / "model", folder / "adapter"
    model(made[0], TINY)
    adapter(made[1], TINY)
    return made


def _weights(rng: np.random.Generator, out: int, in_: int) -> NDArray[ml_dtypes.bfloat16]:
    return (rng.standard_normal((out, in_), np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)


if __name__ == "__main__":
    model(Path(sys.argv[1]) / "llama-4-blocks")
    adapter(Path(sys.argv[1]) / "llama-4-blocks-r16")
