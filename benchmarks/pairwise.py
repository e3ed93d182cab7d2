"""All pairs of a hundred adapters by blocked products, against loops over the pairs.

``seconds`` is the time for everything that `pairwise` measures: cosines of ΔW, φ of both sides with the SVDs it needs,
and cosines of A. The loop computes the same from SVDs made once per adapter. ``cosine_loop`` computes only the cosines
of ΔW, from the factors.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np

COUNT, MODULES, WIDTH, RANK = 100, 12, 768, 8
GOAL = 2.5  # times as fast as the loop that computes the same numbers


def run(data: Path, *, runs: int) -> dict[str, object]:
    """Seconds, and microseconds per pair: the best of ``runs``, in a process of its own with one BLAS thread."""
    del data  # the adapters are made in memory
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.pairwise", str(runs)],
        env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=True,
    )
    report: dict[str, object] = json.loads(done.stdout)
    return report


def main() -> None:
    """Measure and print."""
    from loralens.analysis.every_pair import pairwise

    runs = int(sys.argv[1])
    adapters = _adapters()
    pairs = COUNT * (COUNT + 1) // 2
    blocked, naive, bare = [], [], []
    for _ in range(runs):
        found = _timed(pairwise, adapters, blocked)
        expected = _timed(_loop, adapters, naive)
        cosines = _timed(_cosine_loop, adapters, bare)
    off = max(np.abs(found.cosine - expected["cosine"]).max(), np.abs(found.cosine - cosines).max())
    off = max(off, *(np.abs(found.phi(side) - expected[side]).max() for side in ("in", "out")))
    report = {
        "adapters": COUNT,
        "modules": MODULES,
        "shape": [WIDTH, WIDTH],
        "rank": RANK,
        "seconds": round(min(blocked), 3),
        "loop_seconds": round(min(naive), 3),
        "cosine_loop_seconds": round(min(bare), 3),
        "microseconds_a_pair": round(min(blocked) / pairs * 1e6, 1),
        "loop_microseconds_a_pair": round(min(naive) / pairs * 1e6, 1),
        "times_as_fast": round(min(naive) / min(blocked), 1),
        "largest_difference": float(off),
        "goal_times_as_fast": GOAL,
    }
    sys.stdout.write(json.dumps(report))


def _timed(measure: Callable[[list[Any]], Any], adapters: list[Any], seconds: list[float]) -> Any:
    start = time.perf_counter()
    found = measure(adapters)
    seconds.append(time.perf_counter() - start)
    return found


def _adapters() -> list[Any]:
    import loralens

    rng = np.random.default_rng(0)

    def factors() -> Any:
        B = rng.standard_normal((WIDTH, RANK), np.float32)
        return loralens.LowRank(B, rng.standard_normal((RANK, WIDTH), np.float32))

    return [loralens.Adapter(modules={f"layers.{m}.q_proj": factors() for m in range(MODULES)}) for _ in range(COUNT)]


def _loop(adapters: list[Any]) -> dict[str, Any]:
    """Cosine, mean φ of both sides and mean cosine of A, pair by pair and module by module."""
    parts = [[_parts(module) for module in one.modules.values()] for one in adapters]
    found = {name: np.zeros((len(parts), len(parts))) for name in ("cosine", "out", "in", "A")}
    counts = {"cosine": 1, "out": MODULES * RANK, "in": MODULES * RANK, "A": MODULES}
    for s, t in combinations_with_replacement(range(len(parts)), 2):
        sums = np.zeros(4)
        for (U1, s1, V1, A1), (U2, s2, V2, A2) in zip(parts[s], parts[t], strict=True):
            left, right = U1.T @ U2, V1.T @ V2
            sums += np.sum(np.outer(s1, s2) * left * right), np.sum(left**2), np.sum(right**2), np.vdot(A1, A2)
        for value, (name, matrix) in zip(sums, found.items(), strict=True):
            matrix[s, t] = matrix[t, s] = value / counts[name]
    norms = np.sqrt(found["cosine"].diagonal())
    found["cosine"] /= np.outer(norms, norms)
    return found


def _parts(module: Any) -> tuple[Any, ...]:
    U, s, Vh = module.svd()
    A = module.A.astype(np.float64)
    return U, s, np.ascontiguousarray(Vh.T), A / np.linalg.norm(A)


def _cosine_loop(adapters: list[Any]) -> Any:
    """⟨ΔW₁, ΔW₂⟩ = Σ(B₁ᵀB₂ ∘ A₁A₂ᵀ), pair by pair; the factors are cast to float64 once."""
    cast = [[(m.B.astype(np.float64), m.A.astype(np.float64)) for m in one.modules.values()] for one in adapters]
    inner = np.zeros((len(cast), len(cast)))
    for s, t in combinations_with_replacement(range(len(cast)), 2):
        pairs = zip(cast[s], cast[t], strict=True)
        inner[s, t] = inner[t, s] = sum(np.sum((B1.T @ B2) * (A1 @ A2.T)) for (B1, A1), (B2, A2) in pairs)
    norms = np.sqrt(inner.diagonal())
    return inner / np.outer(norms, norms)


if __name__ == "__main__":
    main()
