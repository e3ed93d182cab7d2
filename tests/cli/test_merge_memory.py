"""Memory: a merge, its undo and its replay take no more for a large tensor than for a small one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.bases import single

pytestmark = pytest.mark.slow

BF16 = np.dtype(ml_dtypes.bfloat16)
ROWS, COLUMNS = 6 << 10, 4 << 10  # 48 MiB in bf16
# MiB in all: Python, NumPy and the work on some rows take 50 to 75, and the tensor would not fit beside them.
LIMIT = 95

Made = tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, object]]  # base, adapter file, its configuration


PROBE = """
import os, re, sys
from pathlib import Path

def leave(code):
    told = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    Path(where).write_text(told[1])
    plain(code)

where, plain = sys.argv.pop(1), os._exit
os._exit, os.cpu_count = leave, lambda: 2
os.sched_getaffinity = lambda process: {0, 1}
from loralens.cli.main import run
run()
"""


def peak(folder: Path, *args: object) -> float:
    """MiB at most of a command in a process of its own, two threads at work.

    From the process itself: what the kernel tells its parent counts the memory of the parent at the fork too.
    """
    command = [sys.executable, "-c", PROBE, str(folder / "peak"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int((folder / "peak").read_text()) / 1024


def weights(*shape: int) -> np.ndarray:
    """Random numbers of bf16 that are quickly made."""
    numbers = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(BF16)
    return np.resize(numbers, shape)


def pair(key: str, out: int, in_: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        f"base_model.model.{key}.lora_A.weight": rng.standard_normal((8, in_), np.float32),
        f"base_model.model.{key}.lora_B.weight": 0.003 * rng.standard_normal((out, 8), np.float32),
    }


def linear() -> Made:
    return {"a.weight": weights(ROWS, COLUMNS)}, pair("a", ROWS, COLUMNS), {}


def lying() -> Made:
    return (
        {"e.weight": weights(ROWS, COLUMNS)},
        {
            "base_model.model.e.lora_embedding_A": np.random.default_rng(1).standard_normal((8, ROWS), np.float32),
            "base_model.model.e.lora_embedding_B": np.full((COLUMNS, 8), 0.01, np.float32),
        },
        {},
    )


def dora() -> Made:
    base, made, config = linear()
    made["base_model.model.a.lora_magnitude_vector"] = np.full(ROWS, 64, np.float32)
    return base, made, {**config, "use_dora": True}


def expert() -> Made:
    """One expert of a stack of two is half of it."""
    made = {}
    for name, array in pair("x.experts", ROWS, COLUMNS).items():
        made[name] = np.ascontiguousarray(np.vstack([array] * 2) if "lora_A" in name else np.hstack([array] * 2))
    base = {"x.experts.w": weights(2, ROWS, COLUMNS // 2)}
    made = {k: (v[:, : COLUMNS // 2] if "lora_A" in k else v) for k, v in made.items()}
    return base, {k: np.ascontiguousarray(v) for k, v in made.items()}, {"target_parameters": ["x.experts.w"]}


def saved() -> Made:
    """A tensor trained in full beside a pair."""
    base = {"a.weight": weights(8, 8), "head.weight": weights(ROWS, COLUMNS)}
    return (
        base,
        pair("a", 8, 8) | {"base_model.model.head.weight": weights(ROWS, COLUMNS)},
        {"modules_to_save": ["head"]},
    )


CASES: dict[str, Callable[[], Made]] = {made.__name__: made for made in (linear, lying, dora, expert, saved)}


def files(made: Made, folder: Path) -> tuple[Path, Path]:
    base, tensors, config = made
    (folder / "adapter").mkdir()
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["a", "e"], **config}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    return single(folder / "base", base, config={"model_type": "x"}), folder / "adapter"


@pytest.mark.parametrize("name", CASES)
def test_peak_memory_does_not_follow_the_largest_tensor(name: str, tmp_path: Path) -> None:
    base, adapter = files(CASES[name](), tmp_path)
    found = {
        "merge": peak(tmp_path, "merge", adapter, "--base", base, "-o", tmp_path / "out"),
        "unmerge": peak(tmp_path, "unmerge", tmp_path / "out", "-o", tmp_path / "back"),
        "verify": peak(tmp_path, "verify", tmp_path / "out", "--base", base, "--adapter", adapter),
    }
    print(name, {k: round(v) for k, v in found.items()})
    assert max(found.values()) < LIMIT, found
