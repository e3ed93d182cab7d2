"""The table of all methods that combine adapters, one row each."""

from dataclasses import replace

from loralens.arithmetic.method import DENSITY, LAM, SPACES, CombiningMethod, Option

_RANK = Option("rank", 0, "directions; 0: as the method has it", low=0, whole=True)
_BETA = "the part of the differences in norm that stays, in [0, 1]"

_WHOLE = "1: the largest entries of the whole adapter are kept, 0: those of every module"
_GAMMA = "the part of the entries, the largest, that is dropped, in [0, 1]"


def _density(default: float) -> Option:
    return replace(DENSITY, default=default)


_ROWS = (
    CombiningMethod(
        "sum",
        "Σ w·ΔW, exact: task arithmetic",
        "Ilharco et al. 2023, arXiv 2212.04089",
        "linear:task_arithmetic",
        linear=True,
    ),
    CombiningMethod(
        "average", "Σ w·ΔW / Σ w, exact", "Wortsman et al. 2022, arXiv 2203.05482", "linear:average", linear=True
    ),
    CombiningMethod(
        "slerp", "along the arc between two updates, t = w₂/(w₁ + w₂)", "Shoemake 1985", "slerp:slerp", adapters=2
    ),
    CombiningMethod("karcher", "mean direction on the sphere, mean length", "Karcher 1977", "slerp:karcher"),
    CombiningMethod(
        "model-stock",
        "the average, drawn to 0 where updates disagree",
        "Jang et al. 2024, arXiv 2403.19522",
        "model_stock:model_stock",
    ),
    CombiningMethod(
        "equal-norms",
        "the sum of updates brought to one norm",
        "He et al. 2026, arXiv 2606.03723, its first step",
        "norms:equal_norms",
        (LAM, Option("beta", 0.0, _BETA, low=0, high=1)),
    ),
    CombiningMethod(
        "cart",
        "the mean, and low-rank parts of what each has beside it",
        "Choi et al. 2024, arXiv 2412.12153",
        "cart:cart",
        (LAM, _RANK),
    ),
    CombiningMethod(
        "tsv-m",
        "singular vectors of all updates made orthogonal to each other",
        "Gargiulo et al. 2025, arXiv 2412.00081",
        "tsv:tsv_m",
    ),
    CombiningMethod(
        "iso-c", "the sum with all singular values alike", "Marczak et al. 2025, arXiv 2502.04959", "iso:iso_c"
    ),
    CombiningMethod(
        "iso-cts",
        "the same, with room for what only one update has",
        "Marczak et al. 2025, arXiv 2502.04959",
        "iso:iso_cts",
        (LAM, Option("common", 0.8, "the part of the directions that is common, in [0, 1]", low=0, high=1)),
    ),
    CombiningMethod(
        "ctm",
        "the sum inside shared subspaces of one adapter's rank (Tucker)",
        "He et al. 2026, arXiv 2606.03723",
        "tucker:compress_then_merge",
        (LAM, _RANK, Option("beta", 0.25, _BETA, low=0, high=1)),
    ),
    CombiningMethod(
        "null-space",
        "all others kept out of what the first reads (NP-LoRA)",
        "Chen et al. 2025, arXiv 2511.11051",
        "projection:null_space",
        (LAM, Option("mu", float("inf"), "how strictly: 0 not at all, inf altogether", low=0, infinite=True), _RANK),
    ),
    CombiningMethod(
        "pico", "outputs that all share turned down first", "Tang & Yang 2026, arXiv 2604.16826", "pico:pico"
    ),
    CombiningMethod(
        "knots",
        "the sum in one basis of outputs: the same as sum",
        "Stoica et al. 2025, arXiv 2410.19735",
        "knots:knots",
    ),
    CombiningMethod(
        "magnitude",
        "the sum of the largest entries of each update",
        "Han et al. 2015, arXiv 1506.02626",
        "magnitude:magnitude",
        (LAM, _density(0.2)),
        SPACES,
    ),
    CombiningMethod(
        "ties",
        "trim to the largest entries, elect a sign for each, average those who agree",
        "Yadav et al. 2023, arXiv 2306.01708",
        "ties:ties",
        (LAM, _density(0.2), Option("whole", 1, _WHOLE, low=0, high=1, whole=True)),
        SPACES,
        looks="ties:prepare_cutoffs",
    ),
    CombiningMethod(
        "dare",
        "drop entries at random, rescale the others, sum; unbiased before it is cut to a rank",
        "Yu et al. 2024, arXiv 2311.03099",
        "dare:dare",
        (LAM, _density(0.1)),
        SPACES,
        seeded=True,
    ),
    CombiningMethod(
        "dare-ties",
        "the same, then elect a sign and average those who agree",
        "Yu et al. 2024, arXiv 2311.03099",
        "dare:dare_ties",
        (LAM, _density(0.1)),
        SPACES,
        seeded=True,
    ),
    CombiningMethod(
        "della",
        "drop small entries the likelier, rescale, elect, average",
        "Deep et al. 2024, arXiv 2406.11617",
        "della:della",
        (
            LAM,
            _density(0.7),
            Option("epsilon", 0.07, "how far the chance to be kept goes up and down with size", low=0),
        ),
        SPACES,
        seeded=True,
    ),
    CombiningMethod(
        "breadcrumbs",
        "the sum without the largest entries and without the small ones",
        "Davari & Belilovsky 2024, arXiv 2312.06795",
        "breadcrumbs:breadcrumbs",
        (LAM, _density(0.15), Option("gamma", 0.006, _GAMMA, low=0, high=1)),
        SPACES,
    ),
    CombiningMethod(
        "sce",
        "where updates vary most: by energy, of those who agree on the sign",
        "Wan et al. 2024, arXiv 2408.07990",
        "sce:sce",
        (LAM, _density(1.0)),
        SPACES,
    ),
)

METHODS = {row.name: row for row in _ROWS}
