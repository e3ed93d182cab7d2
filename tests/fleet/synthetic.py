"""Small adapters with a known truth: families, runs in them, and checkpoints of the runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

import loralens
from tests.draws import draw_factors

SHAPES: Mapping[str, tuple[int, int]] = {
    f"model.layers.{block}.self_attn.{kind}": (40, 32) for block in range(3) for kind in ("q_proj", "v_proj")
}
Factors = dict[str, tuple[np.ndarray, np.ndarray]]


class Entry(NamedTuple):
    """One adapter of the truth."""

    name: str
    family: int
    run: int


def adapter_of(factors: Factors, *, scale: float = 1.0, base: str = "org/tiny") -> loralens.Adapter:
    return loralens.Adapter(
        modules={name: loralens.LowRank(B, A, scale) for name, (B, A) in factors.items()}, base_model=base
    )


def random_factors(rng: np.random.Generator, rank: int = 4) -> Factors:
    drawn = {name: draw_factors(rng, *shape, rank, "f4") for name, shape in SHAPES.items()}
    return {name: (B, A / np.float32(np.sqrt(A.shape[1]))) for name, (B, A) in drawn.items()}


def dense_cosine(first: loralens.Adapter, second: loralens.Adapter) -> tuple[float, float]:
    """The cosines over all modules and over the common ones, from dense matrices."""
    x, y = ({name: module.dense() for name, module in one.items()} for one in (first, second))
    common = x.keys() & y.keys()
    inner = sum(float((x[name] * y[name]).sum()) for name in common)

    def norm(matrices: dict[str, np.ndarray], names: object) -> float:
        return float(np.sqrt(sum((matrices[name] ** 2).sum() for name in names)))  # type: ignore[attr-defined]

    return inner / (norm(x, x) * norm(y, y)), inner / (norm(x, common) * norm(y, common)) if common else 0.0


def make_fleet(folder: Path, *, families: int = 3, runs: int = 3, checkpoints: int = 3, seed: int = 0) -> list[Entry]:
    """Write families of runs of checkpoints: a run begins from its own A, and a family shares half of the energy of B.

    Within a run the cosine is about 0.95, within a family about 0.6, and between families 0.
    """
    rng = np.random.default_rng(seed)
    truth = []
    for family in range(families):
        shared = random_factors(rng)
        for run in range(runs):
            # Rows 0 to 3 are those of the family, in another order of magnitude than the own ones behind them.
            own = random_factors(rng)
            for step in range(1, checkpoints + 1):
                name = f"f{family}-r{run}/checkpoint-{100 * step}"
                noise = random_factors(rng)
                factors = {
                    key: (
                        np.hstack([1.2 * shared[key][0], 0.9 * own[key][0]]) * np.float32(0.5 + 0.1 * step)
                        + 0.1 * np.hstack([noise[key][0], noise[key][0][:, ::-1]]),
                        np.vstack([shared[key][1], own[key][1]]),
                    )
                    for key in SHAPES
                }
                # Another order of the directions in each run, so that the starts of two runs differ entry by entry.
                order = np.random.default_rng(100 * family + run + 1).permutation(8)
                turned = {key: (B[:, order], A[order]) for key, (B, A) in factors.items()}
                loralens.save(adapter_of(turned), folder / name)
                truth.append(Entry(name, family, 10 * family + run))
    return truth


def adjusted_rand(first: list[int], second: list[int]) -> float:
    """The adjusted Rand index by counting pairs one by one (Hubert & Arabie 1985)."""
    pairs = [(i, j) for i in range(len(first)) for j in range(i)]
    a = [first[i] == first[j] for i, j in pairs]
    b = [second[i] == second[j] for i, j in pairs]
    both = sum(x and y for x, y in zip(a, b, strict=True))
    expected = sum(a) * sum(b) / len(pairs)
    largest = (sum(a) + sum(b)) / 2
    return 1.0 if largest == expected else (both - expected) / (largest - expected)
