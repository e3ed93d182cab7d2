"""The page of `without_regret_study.py`: what agrees with the claims and what does not, and every sweep."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from language.claims import (
    SAME,
    Claim,
    Verdict,
    is_larger,
    is_no_larger,
    missing,
    per_seed,
    seeds_line,
    seeds_of,
    within,
)
from language.page_parts import (
    StudyPage,
    around,
    base_text,
    counted,
    listed,
    log_chart,
    machine_text,
    rate_text,
    training_text,
)
from language.sweeps import TENFOLD, Sweep, gaps, rank_spread, rate_ratios, sweeps
from paper_report import table

from loralens.charts.spec import Band, Figure, Line, LineChart
from loralens.tables.numbers import UNDEFINED

LAYERS = {
    "all-linear": "all layers",
    "q_proj+k_proj+v_proj+o_proj": "attention",
    "gate_proj+up_proj+down_proj": "MLP",
    "v_proj": "v of all blocks",
    "model.layers.14.self_attn.v_proj": "v of block 14",
}
MATCHED = 8  # the rank of all layers that attention and MLP have as many parameters as
MARKERS = ("s", "o", "^", "*")


class Cells:
    """The sweeps of a study, by what is asked of them."""

    def __init__(self, numbers: Mapping[str, Any]) -> None:
        self.all = sweeps(numbers)
        self.batch = self.all[0].batch if self.all else 0

    def full(self, batch: int | None = None) -> Sweep | None:
        """Full fine-tuning."""
        return self._first(lambda sweep: sweep.targets is None, batch)

    def ranks(self) -> list[Sweep]:
        """LoRA on all layers, by rank."""
        ours = [sweep for sweep in self.all if sweep.targets == "all-linear" and sweep.batch == self.batch]
        return sorted(ours, key=lambda sweep: sweep.rank or 0)

    def layers(self, name: str) -> Sweep | None:
        """LoRA on attention or MLP."""
        return self._first(lambda sweep: LAYERS.get(sweep.targets or "") == name, self.batch)

    def matched(self, batch: int | None = None) -> Sweep | None:
        """LoRA on all layers, at the rank that the layers are compared at."""
        return self._first(lambda sweep: sweep.targets == "all-linear" and sweep.rank == MATCHED, batch)

    @property
    def larger(self) -> int | None:
        """The larger batch."""
        return next((one.batch for one in self.all if one.batch != self.batch), None)

    def _first(self, matches: Callable[[Sweep], bool], batch: int | None) -> Sweep | None:
        batch = self.batch if batch is None else batch
        return next((one for one in self.all if one.batch == batch and matches(one)), None)


def label(sweep: Sweep) -> str:
    """The name of a cell in tables."""
    if sweep.targets is None:
        return "full fine-tuning"
    return f"{LAYERS.get(sweep.targets, sweep.targets)}, r = {sweep.rank}"


def claims(numbers: Mapping[str, Any]) -> list[Claim]:
    """Every claim with what was measured."""
    cells = Cells(numbers)
    full, matched = cells.full(), cells.matched()
    ranked = [one for one in cells.ranks() if one.bests]
    judged = [
        _same_rate(ranked),
        _tenfold(ranked, full),
        _gap("LoRA on all layers reaches the loss of full fine-tuning", ranked[-1:], full, is_no_larger),
        _gap("LoRA on all layers does so at the lowest rank too", ranked[:1], full, is_no_larger),
    ]
    attention, mlp = cells.layers("attention"), cells.layers("MLP")
    judged += [
        _gap("Attention alone trails all layers, with as many parameters", [attention], matched, is_larger),
        _gap("MLP alone does not", [mlp], matched, is_no_larger),
        _gap("Attention alone trails MLP alone, with as many parameters", [attention], mlp, is_larger),
    ]
    return [*judged, _batches(cells), _capacity(cells)]


def _same_rate(ranked: Sequence[Sweep]) -> Claim:
    text, ratios = "The best rate does not depend on the rank", rank_spread(ranked)
    rates = ", ".join(f"r = {one.rank}: {_rates(one)}" for one in ranked)
    step = max((one.factor for one in ranked), default=1.0)
    ratio_text = f"a factor of {per_seed(ratios, '.1f')} between ranks" if ratios else "missing"
    if len(ranked) < 2:
        return missing(text)
    verdict = within(ratios, 1.0, step)
    if verdict == "agrees" and any(best.edge for one in ranked for best in one.bests):
        verdict = "not decided"  # the best rate of a rank may lie outside the grid
    return Claim(text, f"{ratio_text} ({rates}); the grid has a step of {step:.1f}", verdict)


def _tenfold(ranked: Sequence[Sweep], full: Sweep | None) -> Claim:
    text = "It is about ten times that of full fine-tuning"
    ratios = rate_ratios(ranked, full) if full else []
    if not ratios or full is None:
        return missing(text)
    step = full.factor
    return Claim(
        text,
        f"{per_seed(ratios, '.0f')} times (full fine-tuning: {_rates(full)}); agrees within a step of the grid, "
        f"{TENFOLD / step:.0f} to {TENFOLD * step:.0f}",
        within(ratios, TENFOLD / step, TENFOLD * step),
    )


def _gap(
    text: str, firsts: Sequence[Sweep | None], second: Sweep | None, judge: Callable[[Sequence[float]], Verdict]
) -> Claim:
    first = next(iter(firsts), None)
    if first is None or second is None:
        return missing(text)
    differences = gaps(first, second)
    measured = f"{label(first)} − {label(second)}: {per_seed(differences, '+.3f')}" if differences else "missing"
    return Claim(text, measured, judge(differences))


def _batches(cells: Cells) -> Claim:
    text = "A large batch costs LoRA more than full fine-tuning"
    larger = cells.larger
    pairs = [(cells.matched(batch), cells.full(batch)) for batch in (cells.batch, larger or 0)]
    if any(one is None or other is None for one, other in pairs):
        return missing(text)
    small, large = (gaps(one, other) for one, other in pairs if one and other)
    if not small or not large:
        return missing(text)
    grown = [b - a for a, b in zip(small, large, strict=False)]
    measured = (
        f"LoRA − full fine-tuning: {per_seed(small, '+.3f')} with {cells.batch} texts, {per_seed(large, '+.3f')} with "
        f"{larger}; the difference of these: {per_seed(grown, '+.3f')}"
    )
    return Claim(text, measured, is_larger(grown))


def _capacity(cells: Cells) -> Claim:
    text = "LoRA falls behind where its capacity ends"
    measured = [(one.trained, one, [best.loss for best in one.bests]) for one in _by_size(cells)]
    measured = [row for row in measured if row[2]]
    if len(measured) < 2:
        return missing(text)
    lowest = min(sum(losses) / len(losses) for _, _, losses in measured)
    enough = [size for size, _, losses in measured if sum(losses) / len(losses) <= lowest + SAME]
    losses_text = ", ".join(f"{counted(size)} parameters {around(losses, '.3f')}" for size, _, losses in measured)
    return Claim(text, f"{losses_text}; from {counted(min(enough))} on within {SAME} of the best", "not decided")


def _by_size(cells: Cells) -> list[Sweep]:
    """The cells of LoRA that differ in their number of parameters alone, and not in the kind of layer that trails."""
    ours = [cell for cell in cells.all if cell.targets in ("all-linear", "v_proj") or _is_one(cell)]
    return sorted((cell for cell in ours if cell.batch == cells.batch), key=lambda cell: cell.trained)


def _is_one(sweep: Sweep) -> bool:
    return (sweep.targets or "").endswith(".v_proj")


def _rates(sweep: Sweep) -> str:
    """The best rates of a cell, one for each seed."""
    return (
        " and ".join(f"{rate_text(best.fitted, 1)}{' (end)' if best.edge else ''}" for best in sweep.bests) or "missing"
    )


def sweep_table(numbers: Mapping[str, Any]) -> str:
    """Every cell with its loss at every rate."""
    cells = sweeps(numbers)
    rows = []
    for cell in cells:
        means = cell.mean()
        best = min(means, key=lambda lr: means[lr], default=None)
        shown = []
        for lr in cell.rates:
            values = [losses[lr] for losses in cell.losses.values() if lr in losses]
            finite = [value for value in values if value is not None]
            text = around(finite, ".3f") if finite else "diverged" if values else UNDEFINED
            shown.append(f"{rate_text(lr)}: {f'**{text}**' if lr == best else text}")
        losses = around([best.loss for best in cell.bests], ".3f")
        size = f"{cell.trained:,}" if cell.trained else UNDEFINED
        rows.append([label(cell), size, f"{cell.steps} × {cell.batch}", "; ".join(shown), _rates(cell), losses])
    head = ["cell", "trained", "steps × texts", "loss at each rate", "best rate (fitted)", "loss at the best rate"]
    return table(head, rows)


def missing_runs(numbers: Mapping[str, Any]) -> str:
    """The runs of the plan that are not there, in words."""
    lines = []
    for cell in sweeps(numbers):
        for seed in numbers["plan"]["seeds"]:
            lost = [lr for lr in cell.rates if lr not in cell.losses.get(seed, {})]
            if lost:
                which = "all rates" if len(lost) == len(cell.rates) else listed(list(map(rate_text, lost)))
                lines.append(f"- {label(cell)}, batches of {cell.batch}, seed {seed}: {which}")
    return "\n".join(lines)


def figure(numbers: Mapping[str, Any]) -> Figure:
    """Loss against the rate for ranks, layers and batches, and the best loss against the number of parameters."""
    cells = Cells(numbers)
    ceiling = numbers["base"]["held_out"]
    layers = [cells.layers("attention"), cells.layers("MLP"), cells.matched()]
    batches = [cells.full(), cells.matched()]
    batches += [cells.full(cells.larger), cells.matched(cells.larger)] if cells.larger else []
    charts = [
        _rate_chart("ranks", [cells.full(), *cells.ranks()], ceiling),
        _rate_chart("layers, equal parameters", layers, ceiling),
        _rate_chart("batches, equal texts", batches, ceiling, batch=True),
        _size_chart(cells),
    ]
    bands = [Band([chart for chart in charts if chart is not None], columns=2)]
    return Figure("LoRA Without Regret, in small: mean loss over the seeds", bands)


def _rate_chart(title: str, drawn: Sequence[Sweep | None], ceiling: float, *, batch: bool = False) -> LineChart | None:
    """The mean loss over the rate. What is worse than the untrained model is left out."""
    lines, ticks = [], {}
    for number, one in enumerate(sweep for sweep in drawn if sweep is not None):
        points = {lr: loss for lr, loss in one.mean().items() if loss < ceiling}
        if points:
            name = label(one).replace("all layers", "all") + (f", {one.batch} texts" if batch else "")
            marker = MARKERS[number % len(MARKERS)]
            xs, ys = list(points), list(points.values())
            lines.append(Line(name, xs, ys, f"c{number}", marker, "--" if one.targets is None else "-"))
            ticks |= {lr: rate_text(lr) for lr in points if round(lr / 10 ** _floor(lr), 6) == 1.0}
    return log_chart(title, lines, "learning rate", "loss (nats per token)", ticks) if lines else None


def _floor(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])


def _size_chart(cells: Cells) -> LineChart | None:
    """The best loss of every seed over the number of parameters."""
    points = [(one.trained, best.loss) for one in _by_size(cells) for best in one.bests]
    if not points:
        return None
    sizes = sorted({size for size, _ in points})
    ticks = {10.0**power: counted(10.0**power) for power in range(2, 9) if sizes[0] <= 10.0**power <= sizes[-1]}
    lines = [Line("LoRA, each seed", *zip(*points, strict=True), "c0", "o", "")]
    full = cells.full()
    if full is not None and full.bests:
        ends, loss = [sizes[0], sizes[-1]], min(best.loss for best in full.bests)
        lines.append(Line("full fine-tuning, best", ends, [loss, loss], style="--"))
    return log_chart("capacity: at the best rate", lines, "trained parameters", "loss (nats per token)", ticks)


def sections(numbers: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The parts of the page below the figure."""
    return [
        ("Every sweep", sweep_table(numbers)),
        ("What is missing", missing_runs(numbers) or "Nothing of the plan."),
        ("What this cannot show", _limits(numbers)),
    ]


RULES = f"""
Losses are compared at the best rate of each cell, seed by seed; below {SAME} nats they are called equal. *Agrees* means
that every seed says so, *not decided* that the seeds differ or that a best rate is at the end of its grid. A best rate
is the lowest point of a parabola through the best rate of the grid and its neighbours. A sweep that is not complete
counts if these three rates are done."""


def _sizes(numbers: Mapping[str, Any]) -> str:
    plan, texts = numbers["plan"], numbers["texts"]
    planned = len(plan["seeds"]) * sum(len(cell["rates"]) for cell in plan["cells"])
    return (
        f"**{len(numbers['runs'])} of {planned} runs are done**; those that are missing are named below. "
        f"{base_text(numbers)}; its loss is {numbers['base']['held_out']:.3f} before training. "
        f"{training_text(numbers)}, constant rate with a warm-up of 5 %. Judged on {texts['held_out']} sentences "
        f"({texts['held_out_tokens']:,} tokens). Seeds: {seeds_line(numbers)}; ± is half of the range over them. "
        f"{machine_text(numbers)}"
    )


def _limits(numbers: Mapping[str, Any]) -> str:
    recipe, seeds = numbers["plan"]["recipe"], seeds_of(numbers["runs"])
    return f"""\
- {recipe["steps"]} steps are the beginning of a training. B starts at 0, so LoRA loses more of a short run to its
  start. For runs of up to a hundred steps the paper finds a ratio of the rates of about 15; ten is that of long runs.
- Where the capacity ends: {recipe["steps"] * recipe["batch"]} texts are far fewer than fill even r = 1. A cell with few
  parameters is slow here; that it is full cannot be seen. This claim is therefore never decided by these settings.
- The rate of each cell is chosen on the texts that it is judged on, which favours cells with more rates a little.
- Number of seeds: {len(seeds)}. One model of 135 million parameters, one kind of text, no reinforcement learning.
- Batches see the same number of texts, so a larger one has fewer steps, as in one epoch of the paper."""


PAGE = StudyPage(
    script="without_regret_study",
    name="without_regret",
    reading="regret_reading.md",
    title="LoRA Without Regret, in small",
    caption="Loss against the learning rate, and against parameters",
    sizes=_sizes,
    claims=claims,
    rules=RULES,
    figure=figure,
    sections=sections,
)
read, write, page = PAGE.read, PAGE.write, PAGE.text
