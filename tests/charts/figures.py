"""A figure of every builder, of adapters that have holes, zeros, several stacks and modules outside blocks."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

import loralens
from loralens.analysis import (
    Trajectory,
    compare_subspaces,
    interference,
    measure_amplification,
    measure_spectrum,
    measure_trajectory,
    pairwise,
)
from loralens.analysis.every_pair import cluster_order
from loralens.analysis.nested import nesting
from loralens.charts.amplification_charts import amplification_figure
from loralens.charts.module_grid import Grid
from loralens.charts.pair_charts import nesting_figure, pairwise_figure, similarity_figure
from loralens.charts.run_charts import trajectory_figure
from loralens.charts.spec import Band, Figure, HeatMap, LineChart
from loralens.charts.spectrum_charts import curve_figure, energy_chart, energy_map, energy_scale, spectrum_figure
from loralens.compression.truncation_plan import Choice, CurvePoint
from loralens.core import LazyArray, Weight

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def lines_of(figure: Figure) -> dict[str, LineChart]:
    return {chart.title: chart for chart in figure.charts if isinstance(chart, LineChart)}


def maps_of(figure: Figure, *, small: bool = False) -> list[HeatMap]:
    """The maps of a figure, or its small pictures of φ."""
    return [chart for chart in figure.charts if isinstance(chart, HeatMap) and chart.small == small]


def adapter(
    seed: int, blocks: int = 3, rank: int = 3, zero: str = "", kinds: Sequence[str] = KINDS
) -> loralens.Adapter:
    """Random factors; the module ``zero`` is 0."""
    rng = np.random.default_rng(seed)
    modules = {}
    head = ["lm_head"] * (kinds is KINDS and seed % 2)
    for name in [f"model.layers.{b}.{kind}" for b in range(blocks) for kind in kinds] + head:
        B, A = rng.standard_normal((12, rank)) * (name != zero), rng.standard_normal((rank, 16))
        modules[name] = loralens.LowRank(B, A)
    return loralens.Adapter(modules=modules)


def _spectrum() -> Figure:
    first = adapter(1, zero="model.layers.1.mlp.down_proj").without(["model.layers.2.self_attn.q_proj"])
    return spectrum_figure(
        {"a $first$ one": measure_spectrum(first), "second": measure_spectrum(adapter(2, 5, rank=9))}
    )


def _stacks() -> Figure:
    names = [f"{stack}.{b}.to_q" for stack, n in (("unet.down_blocks", 12), ("unet.mid", 1)) for b in range(n)]
    rng = np.random.default_rng(0)
    modules = {n: loralens.LowRank(rng.standard_normal((6, 1)), rng.standard_normal((1, 7))) for n in names}
    return spectrum_figure({"unet": measure_spectrum(loralens.Adapter(modules=modules))})


def _energy() -> Figure:
    spectra = measure_spectrum(adapter(1))
    whole = sum(one.frobenius**2 for one in spectra.values())
    shares = {name: one.frobenius**2 / whole for name, one in spectra.items()}
    grid = Grid.of(spectra, shares)
    heat = energy_map(spectra, shares, grid, energy_scale([grid], [shares]))
    return Figure("energy", [Band([energy_chart(spectra, shares)]), Band([heat])])


def _amplification() -> Figure:
    rng, one = np.random.default_rng(5), adapter(2)
    weights = {n: Weight(n, LazyArray.of(rng.standard_normal(m.shape)), False) for n, m in one.items()}
    return amplification_figure(measure_amplification(one, weights), title="mine")


def _similarity() -> Figure:
    return similarity_figure(compare_subspaces(adapter(0, 9), adapter(2, 9, rank=5)), labels=("a", "b"))


def _curve() -> Figure:
    points = [
        CurvePoint(
            rank,
            Choice((rank, rank), 1000 * rank, 40_000 * rank, 1 - rank / 8),
            Choice((1, rank), 1000 * rank, 40_000 * rank, 0.9 * (1 - rank / 8)),
        )
        for rank in range(8, 0, -1)
    ]
    return curve_figure("an [adapter] $x$", points, chosen=(100_000, 0.5))


def _pairs() -> Figure:
    adapters = [adapter(2 * i, blocks=2 + i) for i in range(4)]
    pairs = pairwise(adapters)
    labels = [f"adapter-{i}" for i in range(4)]
    energy = interference(adapters, pairs.modules)
    return pairwise_figure(labels, pairs, energy, cluster_order(pairs.cosine)[1], list(pairs.overlaps))


LOSSES = {"loss": [(1, 3.0), (50, 2.0), (100, 1.5)], "eval loss": [(100, 1.75)]}


def checkpoints() -> Trajectory:
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((2, 9)), rng.standard_normal((8, 2))
    return measure_trajectory(
        [loralens.Adapter(modules={"q": loralens.LowRank(B * t + rng.random(B.shape), A)}) for t in (1, 2, 3)]
    )


def _trajectory(steps: list[int | None]) -> Callable[[], Figure]:
    def made() -> Figure:
        return trajectory_figure(checkpoints(), steps, LOSSES, ["a", "b", "a $very$ long name of a checkpoint indeed"])

    return made


FIGURES: dict[str, Callable[[], Figure]] = {
    "spectrum": cache(_spectrum),
    "stacks": cache(_stacks),
    "energy": cache(_energy),
    "amplification": cache(_amplification),
    "similarity": cache(_similarity),
    "nesting": cache(lambda: nesting_figure(nesting(adapter(0)), label="mine")),
    "curve": cache(_curve),
    "pairs": cache(_pairs),
    "trajectory": cache(_trajectory([10, 50, 100])),
    "checkpoints": cache(_trajectory([10, 50, None])),
}  # fmt: skip
