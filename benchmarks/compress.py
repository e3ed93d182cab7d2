"""``loralens compress`` against its floor (read the file, write as much), and one module against two dense routes."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.process import alternate

FLOOR = """
import os, sys
import numpy, ml_dtypes, safetensors, click
source = os.open(sys.argv[1], os.O_RDONLY)
target = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
buffer = memoryview(bytearray(1 << 20))
while count := os.readv(source, [buffer]):
    os.write(target, buffer[:count])
"""

# One module of 4096 × 11008, r = 64 → 16, from its factors to new ones: what a dense tool does, what one with a
# randomised SVD of the dense ΔW does (Halko et al. 2011, one power step), and what loralens does.
ROUTES = """
import json, time
import numpy as np
from loralens.linalg.product import truncating_maps
rng = np.random.default_rng(0)
B, A = rng.standard_normal((4096, 64), np.float32), rng.standard_normal((64, 11008), np.float32)
def dense():
    U, s, Vh = np.linalg.svd(B @ A, full_matrices=False)
    return U[:, :16] * s[:16], Vh[:16]
def randomised():
    D = B @ A
    Q = np.linalg.qr(D @ rng.standard_normal((D.shape[1], 24), np.float32))[0]
    Q = np.linalg.qr(D @ (D.T @ Q))[0]
    U, s, Vh = np.linalg.svd(Q.T @ D, full_matrices=False)
    return (Q @ U[:, :16]) * s[:16], Vh[:16]
def factored():
    L, s, R = truncating_maps(B, A)
    return B @ L[:, :16], R[:16] @ A
def timed(route):
    start = time.perf_counter()
    new_B, new_A = route()
    return time.perf_counter() - start, new_B.astype(np.float64), new_A.astype(np.float64)
def error(new_B, new_A):
    left, right = np.hstack([B, -new_B]).astype(np.float64), np.vstack([A, new_A]).astype(np.float64)
    whole, rest = ((B.T @ B) * (A @ A.T)).sum(dtype=np.float64), ((left.T @ left) * (right @ right.T)).sum()
    return float(np.sqrt(rest / whole))
factored()
found = {}
for route in (factored, randomised, dense):
    seconds, *new = timed(route)
    found[route.__name__] = {"seconds": round(seconds, 4), "relative_error": round(error(*new), 6)}
print(json.dumps(found))
"""


def run(data: Path, *, runs: int) -> dict[str, object]:
    """Times, ratios and peak memory for the 7B adapter of rank 64 in ``data`` (made where missing), r 64 → 16."""
    subprocess.run([sys.executable, "-m", "benchmarks.synthetic", str(data)], check=True)
    with TemporaryDirectory(dir=data) as folder:
        report = _compare(data / "r64", Path(folder), runs=runs)
    done = subprocess.run([sys.executable, "-c", ROUTES], capture_output=True, text=True, check=True)
    return report | {"one_4096_by_11008_module": json.loads(done.stdout)}


def _compare(source: Path, folder: Path, *, runs: int) -> dict[str, object]:
    loralens = str(Path(sys.executable).with_name("loralens"))
    compress = [loralens, "compress", str(source), "-o", str(folder / "out"), "--overwrite", "--json"]
    figures = alternate(
        {
            "floor": [sys.executable, "-c", FLOOR, str(source / "adapter_model.safetensors"), str(folder / "copy")],
            "rank": [*compress, "--rank", "16"],
            "size": [*compress, "--size", "80MB"],
        },
        runs=runs,
    )
    base = figures["floor"].seconds
    records: dict[str, object] = {name: figure.record() for name, figure in figures.items()}
    ratios = {f"{name}_ratio": round(figures[name].seconds / base, 2) for name in ("rank", "size")}
    return records | ratios | {"goal": 3.5, "goal_peak_mib": 200}
