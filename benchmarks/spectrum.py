"""``loralens spectrum`` against its floor (start, import, read the bytes) and against the dense SVD."""

import subprocess
import sys
from pathlib import Path

from benchmarks.process import Figure, alternate

FLOOR = """
import os, sys
import numpy, ml_dtypes, safetensors, click
fd = os.open(sys.argv[1], os.O_RDONLY)
buffer = bytearray(1 << 20)
while os.readv(fd, [buffer]):
    pass
"""

DENSE = """
import time
import numpy as np
W = np.random.default_rng(0).standard_normal((4096, 4096), np.float32)
start = time.perf_counter()
np.linalg.svd(W, compute_uv=False)
print(time.perf_counter() - start)
"""

GOALS = {"r16": 1.7, "r64": 2.5}


def run(data: Path, *, runs: int) -> dict[str, object]:
    """Times, ratios and peak memory of the adapters in ``data`` (made where missing)."""
    subprocess.run([sys.executable, "-m", "benchmarks.synthetic", str(data)], check=True)
    report: dict[str, object] = {"dense_svd_of_one_4096_seconds": round(_dense(), 2)}
    for rank in (16, 64):
        plain, hard = data / f"r{rank}", data / f"r{rank}-kappa1000"
        report[f"r{rank}"] = _compare(plain, hard, goal=GOALS[f"r{rank}"], runs=runs)
    report["help"] = _help(runs=runs)
    return report


def _dense() -> float:
    """Seconds of what a dense tool does for each of the 224 modules, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", DENSE], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _compare(plain: Path, hard: Path, *, goal: float, runs: int) -> dict[str, object]:
    figures = alternate(
        {
            "floor": [sys.executable, "-c", FLOOR, str(plain / "adapter_model.safetensors")],
            "spectrum": [_loralens(), "spectrum", "--json", str(plain)],
            "spectrum_kappa1000": [_loralens(), "spectrum", "--json", str(hard)],
        },
        runs=runs,
    )
    return _with_ratios(figures, "floor") | {"goal": goal, "goal_kappa1000": 2 * goal, "goal_peak_mib": 100}


def _help(*, runs: int) -> dict[str, object]:
    figures = alternate(
        {
            "floor": [sys.executable, "-c", "import click"],
            "help": [_loralens(), "--help"],
            "spectrum_help": [_loralens(), "spectrum", "--help"],
        },
        runs=2 * runs,
    )
    return _with_ratios(figures, "floor") | {"goal": 2.0}


def _with_ratios(figures: dict[str, Figure], floor: str) -> dict[str, object]:
    base = figures[floor].seconds
    records: dict[str, object] = {name: figure.record() for name, figure in figures.items()}
    return records | {f"{name}_ratio": round(f.seconds / base, 2) for name, f in figures.items() if name != floor}


def _loralens() -> str:
    return str(Path(sys.executable).with_name("loralens"))
