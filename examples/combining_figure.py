"""The picture of `combining_study.py`: what every method keeps of the adapters, task by task."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from loralens.charts.figure_file import save_figure
from loralens.charts.mpl import fix_layout, style_context

if TYPE_CHECKING:
    from combining_study import Plan

MARKS = (("o", "#0072B2"), ("s", "#D55E00"), ("^", "#009E73"), ("D", "#CC79A7"))


def draw(plan: "Plan", found: Sequence[Mapping[str, Any]], ends: Mapping[str, Any], path: Path) -> None:
    """One row per method, best on top: a mark for each task, a bar for their mean, a dot for each set of adapters."""

    def kept(accuracy: Mapping[str, float], number: str, task: str) -> float:
        return accuracy[task] / float(ends["alone"][number][task])

    def mean(one: Mapping[str, Any]) -> float:
        return fmean(kept(a, n, task) for n, a in one["accuracy"].items() for task in plan.tasks)

    ordered = sorted([*found, {"method": "no adapter", "accuracy": ends["without"]}], key=mean)
    with style_context():
        figure = Figure(figsize=(6.4, 0.26 * len(ordered) + 1.2), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(range(len(ordered)), [mean(one) for one in ordered], color="0.88", height=0.7, label="mean")
        for (mark, colour), task in zip(MARKS, plan.tasks, strict=False):
            values = [fmean(kept(a, n, task) for n, a in one["accuracy"].items()) for one in ordered]
            axes.plot(values, range(len(ordered)), mark, color=colour, ms=4, label=task)
        for row, one in enumerate(ordered):
            each = [fmean(kept(a, n, task) for task in plan.tasks) for n, a in one["accuracy"].items()]
            axes.plot(each, [row] * len(each), "|", color="black", ms=7, label="sets" if not row else None)
        axes.axvline(1, color="0.4", lw=0.6, ls=":")
        axes.set_yticks(range(len(ordered)), [one["method"] for one in ordered])
        axes.set_xlabel("accuracy, as a share of what each adapter reaches alone")
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.45, -0.1), ncols=6)
    save_figure(fix_layout(figure), path, overwrite=True)
