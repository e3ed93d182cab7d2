"""A small base in NF4 as bitsandbytes stores it, with an adapter; made without the package's own code."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from loralens import Adapter
from tests.bases import CONFIG, MODULES
from tests.draws import draw_adapter
from tests.merging.low_bit.grids import NF4

SHAPE = (48, 128)
BLOCK = 64


def quantise(W: Any) -> tuple[Any, Any]:
    """Codes of the nearest levels and the scales of blocks of 64, by comparing with every level."""
    blocks = W.reshape(-1, BLOCK)
    absmax = np.abs(blocks).max(axis=1)
    codes = np.abs(blocks[:, :, None] / absmax[:, None, None] - NF4).argmin(axis=2)
    return codes.astype(np.uint8), absmax.astype(np.float32)


def decode(codes: Any, absmax: Any, shape: tuple[int, int] = SHAPE) -> Any:
    return (NF4[codes] * absmax[:, None]).reshape(shape)


def pack(codes: Any) -> Any:
    flat = codes.reshape(-1)
    return (flat[::2] << 4 | flat[1::2]).reshape(-1, 1)


def unpack(stored: Any) -> Any:
    flat = stored.reshape(-1)
    return np.stack([flat >> 4, flat & 15], axis=1).reshape(-1, BLOCK)


def floats(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {f"{name}.weight": (0.05 * rng.standard_normal(SHAPE)).astype(np.float32) for name in MODULES}


def nf4_base(folder: Path, *, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(SHAPE)}
    held: dict[str, Any] = {"model.norm.weight": np.ones(128, np.float32)}
    for key, W in floats(seed).items():
        codes, absmax = quantise(W)
        held[key] = pack(codes)
        held[f"{key}.absmax"] = absmax
        held[f"{key}.quant_map"] = NF4
        text = json.dumps(state).encode()
        held[f"{key}.quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": section}))
    return folder


def pair_adapter(size: float = 2e-3, *, base_model: str | None = None, seed: int = 1) -> Adapter:
    return draw_adapter(seed, dict.fromkeys(MODULES, SHAPE), 4, size, base_model=base_model)


def stored(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")
