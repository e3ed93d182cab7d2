"""The table of all methods that combine adapters, one row each."""

from dataclasses import replace
from math import inf
from typing import Any

from loralens.arithmetic.method import DENSITY, LAM, SPACES, CombiningMethod, Option

# The defaults are those of the papers or of their authors' code; the docstrings of the rules say which.
_RANK = Option("rank", 0, "the number of directions; 0 takes the default of the method", low=0, whole=True)
_BETA = Option("beta", 0.25, "the share of the differences in norm that stays, in [0, 1]", low=0, high=1)
_COMMON = Option("common", 0.8, "the share of the directions that is common to all updates, in [0, 1]", low=0, high=1)
_MU = Option("mu", inf, "how strictly the other adapters are kept out: 0 not at all, inf fully", low=0, infinite=True)
_WHOLE_TEXT = "1 keeps the largest entries of the whole adapter, 0 those of every module"
_WHOLE = Option("whole", 1, _WHOLE_TEXT, low=0, high=1, whole=True)
_GAMMA = Option("gamma", 0.006, "the share of the largest entries that is dropped, in [0, 1]", low=0, high=1)
_EPSILON = Option("epsilon", 0.07, "how far the probability of an entry may lie from the density", low=0)


def _elementwise(name: str, text: str, paper: str, density: float, *options: Option, **row: Any) -> CombiningMethod:
    """A method that looks at single entries: it has a density, and its result depends on the space in which it acts."""
    options = (LAM, replace(DENSITY, default=density), *options)
    return CombiningMethod(name, text, paper, options, home="elementwise_methods", spaces=SPACES, **row)


# Methods that do not depend on the space come first, the plain ones before those that act on singular vectors; then the
# elementwise ones. Messages list them in this order.
_ROWS = (
    # Only these two are linear: their factors do not depend on the updates, so they also combine DoRA.
    CombiningMethod(
        "sum", "task arithmetic: the exact sum Σ w·ΔW",
        "Ilharco et al. 2023, arXiv 2212.04089", linear=True,
        home="linear_methods:task_arithmetic",
    ),
    CombiningMethod(
        "average", "the exact mean Σ w·ΔW / Σ w",
        "Wortsman et al. 2022, arXiv 2203.05482", linear=True,
        home="linear_methods",
    ),
    # Means on the sphere, and means that depend on how far the updates agree.
    CombiningMethod(
        "slerp", "a point on the arc between two updates, at t = w₂/(w₁ + w₂)", "Shoemake 1985", adapters=2,
        home="linear_methods",
    ),
    CombiningMethod(
        "karcher", "the mean direction on the sphere, at the mean length", "Karcher 1977",
        home="linear_methods",
    ),
    CombiningMethod(
        "model-stock", "the average, shrunk towards 0 where updates disagree", "Jang et al. 2024, arXiv 2403.19522",
        home="linear_methods",
    ),
    CombiningMethod(
        "equal-norms", "the sum of updates that are scaled to one norm",
        "He et al. 2026, arXiv 2606.03723, its first step", (LAM, replace(_BETA, default=0.0)),
        home="linear_methods",
    ),
    # Rules on singular vectors and subspaces.
    CombiningMethod(
        "cart", "the mean, and the low-rank part of every deviation from it",
        "Choi et al. 2024, arXiv 2412.12153", (LAM, _RANK),
        home="subspace_methods",
    ),
    CombiningMethod(
        "tsv-m", "the singular vectors of all updates, made orthogonal to each other",
        "Gargiulo et al. 2025, arXiv 2412.00081",
        home="subspace_methods",
    ),
    CombiningMethod(
        "iso-c", "the sum with all singular values made equal",
        "Marczak et al. 2025, arXiv 2502.04959",
        home="subspace_methods",
    ),
    CombiningMethod(
        "iso-cts", "iso-c with further directions that only one update has",
        "Marczak et al. 2025, arXiv 2502.04959", (LAM, _COMMON),
        home="subspace_methods",
    ),
    CombiningMethod(
        "ctm", "Compress-then-Merge: the sum within two subspaces of one adapter's rank that all updates share",
        "He et al. 2026, arXiv 2606.03723", (LAM, _RANK, _BETA),
        home="subspace_methods:compress_then_merge",
    ),
    CombiningMethod(
        "null-space", "NP-LoRA: the others are kept out of the input directions of the first",
        "Chen et al. 2025, arXiv 2511.11051", (LAM, _MU, _RANK),
        home="linear_methods",
    ),
    CombiningMethod(
        "pico", "the sum, in which output directions that many updates share are weakened",
        "Tang & Yang 2026, arXiv 2604.16826",
        home="subspace_methods",
    ),
    CombiningMethod(
        "knots", "the sum in a common basis of the outputs, which equals sum", "Stoica et al. 2025, arXiv 2410.19735",
        home="subspace_methods",
    ),
    # Elementwise rules. Their densities are those of the papers, which combine full fine-tunes.
    _elementwise(
        "magnitude", "the sum of the largest entries of each update", "Han et al. 2015, arXiv 1506.02626", 0.2,
    ),
    _elementwise(
        "ties", "trim each update to its largest entries, elect a sign for every entry, average the updates that agree",
        "Yadav et al. 2023, arXiv 2306.01708", 0.2, _WHOLE, looks="prepare_cutoffs",
    ),
    _elementwise(
        "dare", "drop entries at random, rescale the others and add them; unbiased before it is cut to a rank",
        "Yu et al. 2024, arXiv 2311.03099", 0.1, seeded=True,
    ),
    _elementwise(
        "dare-ties", "dare, but elect a sign for every entry and average the updates that agree",
        "Yu et al. 2024, arXiv 2311.03099", 0.1, seeded=True,
    ),
    _elementwise(
        "della", "dare-ties, but drop small entries with a higher probability",
        "Deep et al. 2024, arXiv 2406.11617", 0.7, _EPSILON, seeded=True,
    ),
    _elementwise(
        "breadcrumbs", "the sum without the largest entries and without the small ones",
        "Davari & Belilovsky 2024, arXiv 2312.06795", 0.15, _GAMMA,
    ),
    _elementwise(
        "sce", "keep the entries where updates vary most, elect a sign, average those that agree, weighted by energy",
        "Wan et al. 2024, arXiv 2408.07990", 1.0,
    ),
)  # fmt: skip

# By name, and still in the order of the rows, in which messages list them.
METHODS = {row.name: row for row in _ROWS}
