"""Synthetic PEFT adapters of a 7B Llama: 32 blocks × 7 linear modules, bf16."""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

BLOCKS = 32
HIDDEN, INNER = 4096, 11008
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def adapter(folder: Path, *, rank: int, condition: float = 1.0, seed: int | None = None) -> Path:
    """The folder of an adapter of this rank; made if it does not exist. The seed is the rank unless given.

    ``condition`` is κ, the condition number, of every B.
    """
    file = folder / "adapter_model.safetensors"
    if file.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(rank if seed is None else seed)
    tensors = {}
    for block in range(BLOCKS):
        for name, (out, in_) in LINEAR.items():
            key = f"base_model.model.model.layers.{block}.{name}"
            tensors[f"{key}.lora_A.weight"] = _narrow(rng.standard_normal((rank, in_), np.float32) / in_**0.5)
            tensors[f"{key}.lora_B.weight"] = _narrow(_conditioned(rng, out, rank, condition) * 0.01)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({n.split(".")[1] for n in LINEAR}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def main() -> None:
    """Make adapters of ranks 16 and 64, in a process of its own, so that its memory is not part of a measurement."""
    data = Path(sys.argv[1])
    for rank in (16, 64):
        adapter(data / f"r{rank}", rank=rank)
        adapter(data / f"r{rank}-kappa1000", rank=rank, condition=1e3)


def _conditioned(rng: np.random.Generator, out: int, rank: int, condition: float) -> NDArray[np.float32]:
    B = rng.standard_normal((out, rank), np.float32)
    if condition == 1.0 or rank == 1:
        return B
    spectrum = np.geomspace(1.0, 1.0 / condition, rank)
    rotation = np.linalg.qr(rng.standard_normal((rank, rank)))[0]
    return (np.linalg.qr(B)[0] * spectrum @ rotation * out**0.5).astype(np.float32)


def _narrow(array: NDArray[np.float32]) -> NDArray[ml_dtypes.bfloat16]:
    return array.astype(ml_dtypes.bfloat16)


if __name__ == "__main__":
    main()
