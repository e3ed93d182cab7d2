"""Charts: one specification of each figure, and two renderers: SVG for pages, matplotlib for everything else."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.charts.amplification import amplification_figure
    from loralens.charts.curve import curve_figure
    from loralens.charts.figure import check_suffix, save
    from loralens.charts.mpl import draw
    from loralens.charts.pairwise import pairwise_figure
    from loralens.charts.similarity import similarity_figure
    from loralens.charts.similarity_nested import nesting_figure
    from loralens.charts.spec import Figure
    from loralens.charts.spectrum import spectrum_figure
    from loralens.charts.trajectory import trajectory_figure

__all__ = [
    "Figure",
    "amplification_figure",
    "check_suffix",
    "curve_figure",
    "draw",
    "nesting_figure",
    "pairwise_figure",
    "save",
    "similarity_figure",
    "spectrum_figure",
    "trajectory_figure",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Figure": "spec",
        "amplification_figure": "amplification",
        "check_suffix": "figure",
        "curve_figure": "curve",
        "draw": "mpl",
        "nesting_figure": "similarity_nested",
        "pairwise_figure": "pairwise",
        "save": "figure",
        "similarity_figure": "similarity",
        "spectrum_figure": "spectrum",
        "trajectory_figure": "trajectory",
    },
)
