"""``loralens amplify`` against its floor: reading the base, and two thin float32 products per weight."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from benchmarks.process import alternate
from benchmarks.synthetic import LINEAR

BLOCKS, RANK = 2, 16

FLOOR = """
import sys
import click, ml_dtypes, numpy as np
from safetensors import safe_open
V = np.random.default_rng(0).standard_normal((11008, 16), np.float32)
buffer = np.empty(1 << 20, np.float32)
for path in sys.argv[1:]:
    with safe_open(path, "np") as file:
        for key in file.keys():
            part = file.get_slice(key)
            rows, width = part.get_shape()
            step = buffer.size // width
            for i in range(0, rows, step):
                block = part[i : min(i + step, rows)]
                W = buffer[: block.size].reshape(block.shape)
                np.copyto(W, block)
                W @ V[:width], V[: len(W)].T @ W
"""


def run(data: Path, *, runs: int) -> dict[str, object]:
    """Times, ratios to the floor and peak memory on two blocks of a 7B base in bf16, 772 MiB in two shards.

    The floor is the faster of two: BLAS with one thread, and BLAS with its default number of threads. The leading
    directions of W are computed, or read from those that an earlier run has kept; the run that does not count keeps
    them.
    """
    subprocess.run([sys.executable, "-m", "benchmarks.amplify", str(data)], check=True)
    base, adapter = data / "base-2-blocks", data / "r16-2-blocks"
    command = [str(Path(sys.executable).with_name("loralens")), "amplify", str(adapter), "--base", str(base), "--json"]
    floor = [sys.executable, "-c", FLOOR, *map(str, sorted(base.glob("*.safetensors")))]
    figures = alternate(
        {
            "floor_one_thread": ["env", "OPENBLAS_NUM_THREADS=1", *floor],
            "floor_all_threads": floor,
            "no_top": [*command, "--no-top"],
            "top": [*command, "--no-cache"],
            "top_kept": [*command, "--cache", str(data / "directions")],
        },
        runs=runs,
    )
    fastest = min(figures[name].seconds for name in ("floor_one_thread", "floor_all_threads"))
    largest = 4 * max(out * in_ for out, in_ in LINEAR.values()) / 2**20
    return {
        "base_mib": round(sum(file.stat().st_size for file in base.glob("*.safetensors")) / 2**20, 1),
        "largest_weight_in_float32_mib": round(largest, 1),
        **{name: figure.record() for name, figure in figures.items()},
        "no_top_ratio": round(figures["no_top"].seconds / fastest, 2),
        "top_ratio": round(figures["top"].seconds / fastest, 2),
        "top_kept_ratio": round(figures["top_kept"].seconds / fastest, 2),
        "goal_no_top": 2.0,
        "goal_top": 5.0,
        "peak_weights": {name: round(figures[name].peak_mib / largest, 2) for name in ("no_top", "top", "top_kept")},
        "goal_peak_weights": 3.0,
    }


def base(folder: Path) -> Path:
    """Two blocks of linear weights with the shapes of a 7B Llama, one shard per block; made if they do not exist."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng, names = np.random.default_rng(0), {}
    for block in range(BLOCKS):
        shard = f"model-{block + 1:05}-of-{BLOCKS:05}.safetensors"
        tensors = {}
        for name, (out, in_) in LINEAR.items():
            key = f"model.layers.{block}.{name}.weight"
            W = rng.standard_normal((out, in_), np.float32)
            W *= np.arange(1, in_ + 1, dtype=np.float32) ** -0.3 / in_**0.5  # a spectrum that falls, as real ones do
            tensors[key], names[key] = W.astype(ml_dtypes.bfloat16), shard
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    index.write_text(json.dumps({"weight_map": names}))
    return folder


def adapter(folder: Path) -> Path:
    """An adapter for every weight of `base`; made if it does not exist."""
    if (folder / "adapter_model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng, tensors = np.random.default_rng(1), {}
    for block in range(BLOCKS):
        for name, (out, in_) in LINEAR.items():
            key = f"base_model.model.model.layers.{block}.{name}"
            A, B = (rng.standard_normal(shape, np.float32) * 0.01 for shape in ((RANK, in_), (out, RANK)))
            tensors |= {
                f"{key}.lora_A.weight": A.astype(ml_dtypes.bfloat16),
                f"{key}.lora_B.weight": B.astype(ml_dtypes.bfloat16),
            }
    targets = sorted({name.split(".")[1] for name in LINEAR})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


if __name__ == "__main__":  # in a process of its own, so that its memory is not part of a measurement
    base(Path(sys.argv[1]) / "base-2-blocks")
    adapter(Path(sys.argv[1]) / "r16-2-blocks")
