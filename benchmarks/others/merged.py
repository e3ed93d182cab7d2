"""The judge of merged weights: every result against W + ΔW in dense float64, without code of the tools it judges.

Every 17th row of each adapted weight is compared, which is enough for three digits of an error over all of them. The
step is odd, so that the rows have different places in the heads of attention, whose order differs between formats.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from benchmarks import judge

EVERY = 17
DTYPES: dict[str, DTypeLike] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


@dataclass(frozen=True)
class Adapted:
    """Rows of one adapted weight: of W, of ΔW, of W + ΔW rounded to the nearest numbers, and of each result."""

    weight: judge.Matrix
    update: judge.Matrix
    nearest: judge.Matrix
    results: Mapping[str, judge.Matrix]


def errors(weights: Iterable[Adapted]) -> dict[str, dict[str, float]]:
    """Result → its distance from W + ΔW relative to ‖ΔW‖, and the strength of ΔW in it, over all weights.

    ``nearest`` is one of the results: no other result in its dtype is nearer.
    """
    update, far, along = 0.0, dict[str, float](), dict[str, float]()
    for one in weights:
        update += _energy(one.update)
        exact = one.weight + one.update
        for name, found in {"nearest": one.nearest, **one.results}.items():
            far[name] = far.get(name, 0.0) + _energy(found - exact)
            along[name] = along.get(name, 0.0) + float(np.vdot(found - one.weight, one.update))
    return {
        name: {"error": float(f"{(far[name] / update) ** 0.5:.4g}"), "strength": float(f"{along[name] / update:.5g}")}
        for name in far
    }


def of_models(base: Path, adapter: Path, results: Mapping[str, Path]) -> Iterator[Adapted]:
    """The adapted weights of models in safetensors."""
    pairs, weights = judge.factors(adapter), _tensors(base)
    merged = {name: _tensors(folder) for name, folder in results.items()}
    for module, (B, A) in pairs.items():
        stored = weights[f"{module}.weight"]
        W, update = _wide(stored), B[::EVERY] @ A
        nearest = (W + update).astype(stored.dtype).astype(np.float64)
        yield Adapted(W, update, nearest, {name: _wide(found[f"{module}.weight"]) for name, found in merged.items()})


def of_ggufs(base: Path, adapter: Path, results: Mapping[str, Path], names: Mapping[str, str]) -> Iterator[Adapted]:
    """The adapted weights of GGUF files of a Llama; ``names`` has the layers of a block as both sides call them."""
    from gguf import GGUFReader

    pairs, reader = judge.factors(adapter), GGUFReader(base)
    weights = {one.name: one for one in reader.tensors}
    heads = int(reader.get_field("llama.attention.head_count").contents())
    merged = {name: {one.name: one for one in GGUFReader(file).tensors} for name, file in results.items()}
    for module, (B, A) in pairs.items():
        _, _, block, layer = module.split(".", 3)
        key = f"blk.{block}.{names[layer]}.weight"
        W, update = _decoded(weights[key]), _rows_of_ggml(B, layer, heads)[::EVERY] @ A
        nearest = (W + update).astype(np.float16).astype(np.float64)
        yield Adapted(W, update, nearest, {name: _decoded(found[key]) for name, found in merged.items()})


def _rows_of_ggml(B: judge.Matrix, layer: str, heads: int) -> judge.Matrix:
    """Rows in the order of GGUF: llama.cpp rotates neighbours of q and k, where transformers rotates halves."""
    if layer not in {"self_attn.q_proj", "self_attn.k_proj"}:
        return B
    return B.reshape(heads, 2, -1, B.shape[1]).swapaxes(1, 2).reshape(B.shape)


def _decoded(tensor: Any) -> judge.Matrix:
    from gguf.quants import dequantize

    decoded: judge.Matrix = dequantize(tensor.data[::EVERY], tensor.tensor_type).astype(np.float64)
    return decoded


def _tensors(folder: Path) -> dict[str, NDArray[Any]]:
    """Views of all tensors of a model, whatever its files are called."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw = np.memmap(file, np.uint8, "r")
        length = int(raw[:8].view("<u8")[0])
        for key, entry in json.loads(bytes(raw[8 : 8 + length])).items():
            if key != "__metadata__":
                start, stop = (8 + length + offset for offset in entry["data_offsets"])
                found[key] = raw[start:stop].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def _wide(stored: NDArray[Any]) -> judge.Matrix:
    return stored[::EVERY].astype(np.float64)


def _energy(matrix: judge.Matrix) -> float:
    return float(np.vdot(matrix, matrix))
