"""The picture of `low_bit_study.py`: the divergence that each method leaves of each adapter."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from low_bit_report import LABELS, relative, ways
from matplotlib.figure import Figure

from loralens.charts.figure import save_figure
from loralens.charts.mpl import fix_layout
from loralens.charts.mpl_style import style_context

MARKS = {
    "nearest": ("x", "0.4"),
    "fresh": ("v", "#CC79A7"),
    "gptq": ("s", "#D55E00"),
    "stochastic": ("o", "#0072B2"),
    "sweep": ("D", "#009E73"),
}


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A row for each adapter, the strongest on top, and a mark for each method; KL has a logarithmic axis."""
    ordered = list(reversed(found))
    with style_context():
        figure = Figure(figsize=(7.4, 0.34 * len(ordered) + 1.3), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, part, title in zip(panels, ("in", "out"), ("on the texts of the adapter", "elsewhere"), strict=True):
            for method, (mark, colour) in MARKS.items():
                values = [fmean(relative(part)(entry, way) for way in ways(entry, method)) for entry in ordered]
                axes.plot(values, range(len(ordered)), mark, color=colour, ms=5, ls="", label=LABELS[method])
            axes.axvline(1, color="0.4", lw=0.6, ls=":")
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            axes.xaxis.set_minor_formatter(lambda *_: "")
            axes.set_title(title, fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_yticks(range(len(ordered)), [entry["adapter"]["name"] for entry in ordered])
        figure.supxlabel("KL(unmerged ‖ merged), as a share of KL(unmerged ‖ base)", fontsize=8)
        figure.legend(
            *panels[0].get_legend_handles_labels(), frameon=False, fontsize=7, loc="outside upper center", ncols=5
        )
    save_figure(fix_layout(figure), path)
