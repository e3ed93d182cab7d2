"""Results of runs and measurements, read from their folder, as one table and one figure."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rivals.methods import METHODS, Method

from loralens.charts.mpl import fix_layout, style_context
from loralens.errors import OptionError
from loralens.tables.numbers import fixed

LATENCIES = ("1", "32")
FORMS = ("merged", "unmerged")
RECIPE = ("steps", "batch", "length", "limit")
# Readers with colour blindness can tell these colours apart, and markers differ too. In the order of `METHODS`.
LOOKS = (("s", "black"), ("^", "#E69F00"), ("D", "#009E73"), ("v", "#CC79A7"), ("o", "#0072B2"), ("P", "#56B4E9"))
NOTHING = "–"


@dataclass(frozen=True)
class Results:
    """The results so far: runs of `train_one`, and measurements of `measure` by method."""

    runs: tuple[dict[str, Any], ...]
    costs: dict[str, dict[str, Any]]

    @property
    def corpora(self) -> list[str]:
        """The corpora of the runs, in the order of the runs."""
        return list(dict.fromkeys(run["corpus"] for run in self.runs))

    @property
    def methods(self) -> list[Method]:
        """The methods with any result, in the order of `METHODS`."""
        seen = {run["method"] for run in self.runs} | set(self.costs)
        return [method for method in METHODS if method.name in seen]

    def of(self, method: Method, corpus: str | None = None) -> list[dict[str, Any]]:
        """The runs of a method, on one corpus or all."""
        return [run for run in self.runs if run["method"] == method.name and corpus in (None, run["corpus"])]


def read_results(folder: Path) -> Results:
    """All results in the output folder of `alternatives.py`.

    Raises
    ------
    OptionError
        Runs have different recipes, so their accuracies cannot be compared.
    """
    runs = [_read(path) for path in sorted((folder / "runs").glob("*.json"))]
    costs = [_read(path) for path in sorted((folder / "costs").glob("*.json"))]
    recipes = sorted({tuple(run[name] for name in RECIPE if run[name] is not None) for run in runs})
    if len(recipes) > 1:
        said = "; ".join(
            ", ".join(f"{name} {value}" for name, value in zip(RECIPE, told, strict=False)) for told in recipes
        )
        raise OptionError(
            f"{folder}: runs of {len(recipes)} recipes: {said}", fix="make all by one recipe, or give another folder"
        )
    return Results(tuple(runs), {cost["method"]: cost for cost in costs})


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def table(results: Results) -> str:
    """Markdown with one row per method and one column per quantity; a dash stands for what was not measured."""
    head = ["method", "trained", "checkpoint", "memory", "step", *(f"accuracy, {name}" for name in results.corpora)]
    head += [f"latency, {count} text{'s' if count != '1' else ''}" for count in LATENCIES]
    rows = [_row(results, method) for method in results.methods]
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *_notes(results), ""])


def _row(results: Results, method: Method) -> list[str]:
    runs, cost = results.of(method), results.costs.get(method.name, {})
    step, memory = cost.get("step"), cost.get("memory")
    return [
        method.text,
        _share(runs[0]) if runs else NOTHING,
        _bytes(next(run["bytes"] for run in runs)) if runs else NOTHING,
        f"{memory['peak']:.0f} MiB (+{memory['peak'] - memory['loaded']:.0f})" if memory else NOTHING,
        f"{step['ratio']:.2f} ×" if step else NOTHING,
        *(accuracies(run["accuracy"] for run in results.of(method, corpus)) for corpus in results.corpora),
        *(_latency(cost, count) for count in LATENCIES),
    ]


def _share(run: dict[str, Any]) -> str:
    body = run["trained"] - run["head"]
    return f"{body:,} ({fixed('.2%')(body / run['base'])})" if body < run["base"] else f"{body:,}"


def _bytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def accuracies(values: Iterable[float]) -> str:
    """The mean in percent; with several values, also half of their range."""
    found = [100 * value for value in values]
    if not found:
        return NOTHING
    spread = f" ± {(max(found) - min(found)) / 2:.1f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.1f}{spread}"


def _latency(cost: dict[str, Any], count: str) -> str:
    """The ratio to the base model; for LoRA, the ratios of the merged and the unmerged model."""
    forms = {name: form[count]["ratio"] for name, form in cost.get("latency", {}).items() if count in form}
    if set(FORMS) <= set(forms):
        return f"{forms['merged']:.2f} × merged, {forms['unmerged']:.2f} × not"
    return ", ".join(f"{value:.2f} ×" for value in forms.values()) or NOTHING


def _notes(results: Results) -> list[str]:
    """The meaning of the columns, with the settings of the runs."""
    notes = [
        "trained: parameters without the head, which every method trains; checkpoint: the file of everything trained"
    ]
    for run in results.runs[:1]:
        seeds = ", ".join(map(str, sorted({run["seed"] for run in results.runs})))
        notes.append(
            f"accuracy: percent of the texts held out, mean ± half the range over seeds {seeds}; "
            f"{run['steps']} steps of {run['batch']} texts of {run['length']} tokens"
        )
    for cost in list(results.costs.values())[:1]:
        steps = f"steps of {cost['batch']} × {cost['length']} tokens"
        if cost["memory"]:
            notes.append(f"memory: peak of a process in {steps}; in brackets, the part that training adds")
        notes.append(f"step: time divided by that of a step of full fine-tuning, {steps}, median over turns")
        base = {count: form[count]["base"] for form in cost["latency"].values() for count in LATENCIES if count in form}
        said = ", ".join(f"{milliseconds:.1f} ms for {count}" for count, milliseconds in base.items())
        notes.append(f"latency: time of a forward pass divided by that of the base model ({said}), median over turns")
    same = [method.text for method in results.methods if _same_graph(results.costs.get(method.name, {}))]
    if same:
        notes.append(
            f"methods that run the base model's own operations, with the same shapes (LoRA merged): {'; '.join(same)}"
        )
    return [f"- {note}." for note in notes]


def _same_graph(cost: dict[str, Any]) -> bool:
    return any(form["same_graph"] for form in cost.get("latency", {}).values())


def figure(results: Results) -> Figure:
    """Accuracy against trained parameters, one panel per corpus; the legend gives the latency of each method."""
    with style_context():
        corpora = results.corpora
        width, many = max(6.4, 3.4 * len(corpora)), max(len(corpora), 1)
        drawn = Figure(figsize=(width, 4.8), layout="constrained")
        panels = drawn.subplots(1, many, squeeze=False)[0]
        for axes, corpus in zip(panels, corpora, strict=False):
            _panel(axes, results, corpus)
        panels[0].set_ylabel("accuracy on the texts held out [%]")
        handles, labels = panels[0].get_legend_handles_labels()
        told = "latency: of one text, beside the base model's" if results.costs else None
        drawn.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=7, title=told)
        drawn.suptitle("LoRA beside the alternatives: same model, texts, steps and seeds")
    return fix_layout(drawn)


def _panel(axes: Axes, results: Results, corpus: str) -> None:
    for method, (marker, colour) in zip(METHODS, LOOKS, strict=True):
        runs = results.of(method, corpus)
        if not runs:
            continue
        values = [100 * run["accuracy"] for run in runs]
        mean = statistics.mean(values)
        axes.errorbar(
            [runs[0]["trained"] - runs[0]["head"]],
            [mean],
            yerr=[[mean - min(values)], [max(values) - mean]],
            marker=marker,
            color=colour,
            markersize=6,
            markerfacecolor="none",  # so that two methods at the same point are both visible
            markeredgewidth=1.4,
            linestyle="none",
            linewidth=1,
            label=method.text + _noted(results.costs.get(method.name, {})),
        )
    axes.set_xscale("log")
    axes.set_xlabel("numbers trained beside the head")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    axes.set_title(corpus, parse_math=False)
    axes.margins(x=0.12, y=0.12)
    axes.grid(visible=True, linewidth=0.3, color="0.85")
    axes.spines[["top", "right"]].set_visible(False)


def _count(value: float) -> str:
    """1000 → 1 k."""
    units: Sequence[tuple[float, str]] = ((1e6, " M"), (1e3, " k"), (1, ""))
    step, unit = next(((s, u) for s, u in units if value >= s), units[-1])
    return f"{value / step:g}{unit}"


def _noted(cost: dict[str, Any]) -> str:
    """The latency of one text at a time, for the legend."""
    forms = {name: form["1"]["ratio"] for name, form in cost.get("latency", {}).items() if "1" in form}
    if not forms:
        return ""
    said: Callable[[str], str] = lambda name: "" if name not in FORMS else f" {name}"  # noqa: E731
    return "; latency " + ", ".join(f"{value:.2f} ×{said(name)}" for name, value in forms.items())
