"""The judge: compares adapters with the exact answer in dense float64, without any code of the tools it judges."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Matrix = NDArray[np.float64]
Matrices = dict[str, Matrix]


def factors(adapter: Path) -> dict[str, tuple[Matrix, Matrix]]:
    """The pairs (scale · B, A) of every module of a PEFT adapter of linear layers with one rank and one α."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    stems = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {
        stem.removeprefix("base_model.model."): (
            scale * tensors[f"{stem}.lora_B.weight"].astype(np.float64),
            tensors[f"{stem}.lora_A.weight"].astype(np.float64),
        )
        for stem in stems
    }


def updates(adapter: Path) -> Matrices:
    """ΔW of every module."""
    return {name: B @ A for name, (B, A) in factors(adapter).items()}


def differences(base: Path, tuned: Path) -> Matrices:
    """Tuned − base, for every linear layer of the blocks."""
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    return {
        key.removesuffix(".weight"): after[key].astype(np.float64) - before[key].astype(np.float64)
        for key in before
        if before[key].ndim == 2 and ".layers." in key
    }


def weighted(adapters: list[Path], weights: tuple[float, ...]) -> Matrices:
    """Σ w·ΔW."""
    parts = [updates(adapter) for adapter in adapters]
    return {name: sum(w * part[name] for w, part in zip(weights, parts, strict=True)) for name in parts[0]}


def ties(adapters: list[Path], density: float) -> Matrices:
    """TIES of ΔW (Yadav et al. 2023), module by module: trim, elect a sign, mean of those who have it."""
    parts = [updates(adapter) for adapter in adapters]
    return {name: _ties(np.stack([part[name] for part in parts]), density) for name in parts[0]}


def _ties(stack: Matrix, density: float) -> Matrix:
    sizes = np.abs(stack).reshape(len(stack), -1)
    kept = int(density * sizes.shape[1])
    cutoffs = np.partition(sizes, sizes.shape[1] - kept, axis=1)[:, sizes.shape[1] - kept]
    trimmed = np.where(np.abs(stack) >= cutoffs[:, None, None], stack, 0.0)
    agreeing = np.where(np.sign(trimmed) == np.sign(trimmed.sum(axis=0)), trimmed, 0.0)
    mean: Matrix = agreeing.sum(axis=0) / np.maximum(np.count_nonzero(agreeing, axis=0), 1)
    return mean


def error(found: Mapping[str, Matrix], exact: Mapping[str, Matrix]) -> float:
    """‖found − exact‖ / ‖exact‖ over all modules."""
    assert found.keys() == exact.keys()
    return float(np.sqrt(sum(_energy(found[n] - exact[n]) for n in exact) / sum(map(_energy, exact.values()))))


def strength(found: Mapping[str, Matrix], exact: Mapping[str, Matrix]) -> float:
    """⟨found, exact⟩ / ‖exact‖²: 1 at full strength."""
    return float(sum(np.vdot(found[n], exact[n]) for n in exact) / sum(map(_energy, exact.values())))


def least_error(exact: Mapping[str, Matrix], rank: int) -> float:
    """The error of the best approximation of this rank, module by module (Eckart & Young 1936).

    Computed from the eigenvalues of a Gram matrix. This loses singular values below √ε of the largest one, which are
    far below the tail that is summed here.
    """
    tail = sum(
        float(np.linalg.eigvalsh(M @ M.T if len(M) < M.shape[1] else M.T @ M)[:-rank].sum()) for M in exact.values()
    )
    return float(np.sqrt(tail / sum(map(_energy, exact.values()))))


def singular_values(adapter: Path) -> dict[str, NDArray[np.float64]]:
    """The singular values of every module, from the QR decompositions of both factors in float64."""
    found = {}
    for name, (B, A) in factors(adapter).items():
        left, right = np.linalg.qr(B, mode="r"), np.linalg.qr(A.T, mode="r")
        found[name] = np.linalg.svd(left @ right.T, compute_uv=False)
    return found


def _energy(matrix: Matrix) -> float:
    return float(np.vdot(matrix, matrix))
