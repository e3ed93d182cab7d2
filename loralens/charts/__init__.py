"""Figures as plain data, and their two renderers: SVG for pages, matplotlib for files and notebooks."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.charts.amplification import amplification_figure
    from loralens.charts.curve import curve_figure
    from loralens.charts.figure import check_suffix, save_figure
    from loralens.charts.mpl import draw_figure
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
    "draw_figure",
    "nesting_figure",
    "pairwise_figure",
    "save_figure",
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
        "draw_figure": "mpl",
        "nesting_figure": "similarity_nested",
        "pairwise_figure": "pairwise",
        "save_figure": "figure",
        "similarity_figure": "similarity",
        "spectrum_figure": "spectrum",
        "trajectory_figure": "trajectory",
    },
)
