"""Memory: a merge, its undo and its replay take no more for a large tensor than for a small one."""

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import loralens
from tests.bases import single
from tests.models import low_rank

pytestmark = pytest.mark.slow

BF16 = np.dtype(ml_dtypes.bfloat16)
ROWS, COLUMNS = 6 << 10, 4 << 10  # 48 MiB in bf16
# MiB in all: Python, NumPy and the work on some rows take 50 to 75, and the tensor would not fit beside them.
LIMIT = 95

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


def test_peak_memory_does_not_follow_the_largest_tensor(tmp_path: Path) -> None:
    held, adapter = {"a.weight": weights(ROWS, COLUMNS)}, tmp_path / "adapter"
    base = single(tmp_path / "base", held, config={"model_type": "x"})
    loralens.save(loralens.Adapter(modules={"a": low_rank(ROWS, COLUMNS, 8, 0.003)}), adapter)
    found = {
        "merge": peak(tmp_path, "merge", adapter, "--base", base, "-o", tmp_path / "out"),
        "unmerge": peak(tmp_path, "unmerge", tmp_path / "out", "-o", tmp_path / "back"),
        "verify": peak(tmp_path, "verify", tmp_path / "out", "--base", base, "--adapter", adapter),
    }
    assert max(found.values()) < LIMIT, found
