"""Intruders of one module by the diagonal-plus-rank-r identity and by the dense definition, both given the SVD of W."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from loralens.analysis.intruders import find_intruders
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.weights import Weight
from loralens.formats.records.cache import SvdCache, weight_digest
from loralens.linalg.lanczos import decompose

SIDE, TOP = 2048, 10
CASES = {"r16": (16, 0.05), "r64": (64, 0.2)}  # rank, and ‖ΔW‖/‖W‖


def run(data: Path, *, runs: int) -> dict[str, object]:
    """Median seconds of both ways at n = 2048, and how many times faster the identity is; ``data`` is not used.

    The identity is timed with all that a second ``loralens intruders`` does for a module: hashing W, reading and
    checking the kept SVD, and computing the answer. The dense way is one SVD of W + ΔW and the cosines; the SVD of W is
    not timed.
    """
    del data
    rng = np.random.default_rng(0)
    W = rng.standard_normal((SIDE, SIDE), np.float32) / SIDE**0.5
    weight = Weight("w", LazyArray.of(W), transposed=False)
    U0 = np.linalg.svd(W.astype(np.float64))[0]
    report: dict[str, object] = {"side": SIDE, "goal_times_faster": 10}
    with tempfile.TemporaryDirectory() as folder:
        cache = SvdCache(Path(folder), limit=10**9)
        cache.write(weight_digest(weight), decompose(W))
        for name, (rank, size) in CASES.items():
            B, A = rng.standard_normal((SIDE, rank)), rng.standard_normal((rank, SIDE))
            B *= size * np.linalg.norm(W) / np.linalg.norm(B @ A)
            report[name] = _compare(LowRank(B, A), W, U0, weight, cache, runs=runs)
    return report


def _compare(
    module: LowRank, W: np.ndarray, U0: np.ndarray, weight: Weight, cache: SvdCache, *, runs: int
) -> dict[str, object]:
    def identity() -> np.ndarray:
        kept = cache.read(weight_digest(weight), weight.shape)
        assert kept is not None
        return find_intruders(module, kept, top=TOP).scores

    def dense() -> np.ndarray:
        U = np.linalg.svd(W + module.dense())[0][:, :TOP]
        return np.abs(U0.T @ U).max(axis=0)

    ours, ours_scores = _timed(identity, runs)
    theirs, theirs_scores = _timed(dense, max(1, runs // 3))
    return {
        "seconds": round(ours, 4),
        "dense_seconds": round(theirs, 3),
        "times_faster": round(theirs / ours, 1),
        "largest_difference_of_scores": float(np.abs(ours_scores - theirs_scores).max()),
    }


def _timed(work: Callable[[], np.ndarray], runs: int) -> tuple[float, np.ndarray]:
    """Median seconds, and the last result."""
    samples, result = [], work()
    for _ in range(runs):
        start = time.perf_counter()
        result = work()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples), result
