"""Adapters as kohya's sd-scripts stores them: those of `synthetic_pair`, and one of rank 64.

The names are those of a language model that serves as a text encoder. The tensors of ``one`` and ``two`` are the same
as in the folders of PEFT, so that one judge serves all tools.
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from benchmarks import judge

WIDE, FALL = 64, 0.7  # the rank of ``wide``, and how fast its singular values fall, as i^−FALL
PREFIX = "lora_te_"


def files_in(pair: Path) -> dict[str, Path]:
    """The files ``one``, ``two`` and ``wide`` beside the folders in ``pair``, made where missing."""
    files = {name: pair / f"{name}.kohya.safetensors" for name in ("one", "two", "wide")}
    for name, file in files.items():
        if not file.exists():
            save_file(_wide(pair / "one") if name == "wide" else _same(pair / name), file)
    return files


def factors(file: Path) -> dict[str, tuple[judge.Matrix, judge.Matrix]]:
    """The pairs (scale · B, A) of every module; the names are those in the file."""
    tensors = load_file(file)
    stems = [key.removesuffix(".lora_down.weight") for key in tensors if key.endswith(".lora_down.weight")]
    found = {}
    for stem in stems:
        A, B = (tensors[f"{stem}.lora_{side}.weight"].astype(np.float64) for side in ("down", "up"))
        found[stem] = float(tensors[f"{stem}.alpha"]) / len(A) * B, A
    return found


def updates(file: Path) -> judge.Matrices:
    """ΔW of every module."""
    return {name: B @ A for name, (B, A) in factors(file).items()}


def name_of(module: str) -> str:
    """The name that a module has in a file of kohya."""
    return PREFIX + module.replace(".", "_")


def _same(adapter: Path) -> dict[str, NDArray[np.float32]]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    alpha = np.float32(json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"])
    found = {}
    for key, X in tensors.items():
        stem, _, end = key.removeprefix("base_model.model.").rpartition(".lora_")
        side = {"A.weight": "down", "B.weight": "up"}[end]
        found[f"{name_of(stem)}.lora_{side}.weight"] = X
        found[f"{name_of(stem)}.alpha"] = np.array(alpha)
    return found


def _wide(adapter: Path) -> dict[str, NDArray[np.float32]]:
    """Random directions for the modules of an adapter, with falling singular values."""
    rng, fall = np.random.default_rng(2), np.arange(1, WIDE + 1, dtype=np.float32) ** -FALL
    found = {}
    for module, (B, A) in judge.factors(adapter).items():
        stem, rank = name_of(module), min(WIDE, len(B), A.shape[1])
        up, down = rng.standard_normal((len(B), rank), np.float32), rng.standard_normal((rank, A.shape[1]), np.float32)
        found[f"{stem}.lora_up.weight"] = up * fall[:rank] / np.float32(len(B) ** 0.5)
        found[f"{stem}.lora_down.weight"] = down / np.float32(A.shape[1] ** 0.5)
        found[f"{stem}.alpha"] = np.array(rank, np.float32)
    return found
