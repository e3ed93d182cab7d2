"""The page of `nlg_study.py`: what every method reaches with how many parameters, and Section 7's questions."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from language.claims import seeds_line, seeds_of
from language.nlg_claims import RULES, claims
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
from paper_report import amplification_table, shared_table, table

from loralens.charts.spec import Band, Figure, Line
from loralens.tables.numbers import fixed

Runs = Sequence[Mapping[str, Any]]
KINDS = ("q_proj", "v_proj")
LABELS = {
    "full": "full fine-tuning",
    "bitfit": "BitFit, with biases added",
    "prefix": "prefix of 16 tokens",
    "bottleneck": "bottlenecks of width 8",
}
MARKERS = {"full": "s", "bitfit": "^", "prefix": "*", "bottleneck": "o"}


def variants(numbers: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Name → the runs at the best rate of the method, one per seed; the ranks of LoRA are methods of their own."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    order = [*LABELS, "lora"]
    runs = [run for run in numbers["runs"] if "loss" in run]
    for run in sorted(runs, key=lambda record: (order.index(record["method"]), record.get("rank") or 0)):
        groups.setdefault(name_of(run), []).append(run)
    # At the first seed several rates may have been judged, until a better one was found.
    first = numbers["plan"]["seeds"][0]
    return {name: [run for run in group if run["lr"] == _best_rate(group, first)] for name, group in groups.items()}


def name_of(run: Mapping[str, Any]) -> str:
    """The name of a run's method in tables."""
    return f"LoRA r = {run['rank']}, q and v" if run["method"] == "lora" else LABELS[run["method"]]


def _best_rate(group: Runs, seed: int) -> float:
    """The rate with the lowest loss on the validation texts at a seed."""
    tried = [run for run in group if run["seed"] == seed] or group
    return float(min(tried, key=lambda run: run["validation"])["lr"])


def results(numbers: Mapping[str, Any]) -> str:
    """Table 3: parameters, loss, BLEU."""
    model = numbers["model_size"]
    base = numbers["base"]
    rows = [["not trained", "0", "", "", fixed(".3f")(base["loss"]), fixed(".1f")(base["bleu"]), _interval([base]), ""]]
    for name, group in variants(numbers).items():
        size = group[0]["trained"]
        rows.append(
            [
                name,
                f"{size:,}",
                fixed(".2%")(size / model),
                rate_text(group[0]["lr"]),
                around([run["loss"] for run in group if run["loss"] is not None], ".3f"),
                around([run["bleu"] for run in group], ".1f"),
                _interval(group),
                fixed(".2f")(fmean(run["seconds"] / run["steps"] for run in group)),
            ]
        )
    head = ["method", "trained", "of the model", "rate", "loss", "BLEU", "95 % over texts", "seconds per step"]
    return table(head, rows)


def _interval(runs: Runs) -> str:
    return f"± {fmean(run['interval'] for run in runs):.1f}"


def rates(numbers: Mapping[str, Any]) -> str:
    """The loss on the validation texts at every rate that was tried, at the first seed."""
    first, rows = numbers["plan"]["seeds"][0], []
    for method, tried in numbers["plan"]["rates"].items():
        runs = [run for run in numbers["runs"] if run["method"] == method and run["seed"] == first]
        if method == "lora":
            runs = [run for run in runs if run["rank"] == 8]
        losses = {run["lr"]: run["validation"] for run in runs}
        best = min((lr for lr in losses if losses[lr] is not None), key=lambda lr: losses[lr], default=None)
        cells = []
        for lr in tried:
            text = "diverged" if lr in losses and losses[lr] is None else fixed(".3f")(losses.get(lr))
            cells.append(f"{rate_text(lr)}: {f'**{text}**' if lr == best else text}")
        edge = "yes" if best in (tried[0], tried[-1]) and best is not None else ""
        rows.append([LABELS.get(method, "LoRA r = 8, q and v"), ", ".join(cells), edge])
    return table(["method", "loss on the validation texts at each rate", "best at the end of the grid"], rows)


def figure(numbers: Mapping[str, Any]) -> Figure:
    """Loss and BLEU against the number of trained parameters; a mark for each seed, and a line through LoRA's ranks."""
    groups = variants(numbers)
    sizes = [run["trained"] for group in groups.values() for run in group] or [1]
    ticks = {10.0**power: counted(10.0**power) for power in range(4, 10) if min(sizes) < 10.0 ** (power + 0.5)}
    ticks = {x: text for x, text in ticks.items() if min(sizes) * 0.7 < x < max(sizes) * 1.4}
    charts = [
        log_chart("", list(_lines(groups, key)), "trained parameters", label, ticks)
        for key, label in (("loss", "loss (nats per token)"), ("bleu", "BLEU"))
    ]
    return Figure("Table 3 of the LoRA paper, in small: a mark for each seed", [Band(charts)])


def _lines(groups: Mapping[str, Runs], key: str) -> Iterator[Line]:
    ranks: list[tuple[float, float]] = []
    seeds: list[tuple[float, float]] = []
    for number, method in enumerate(LABELS):
        points = [(run["trained"], run[key]) for run in groups.get(LABELS[method], []) if run[key] is not None]
        if points:
            xs, ys = zip(*points, strict=True)
            yield Line(LABELS[method], xs, ys, f"c{number + 1}", MARKERS[method], "")
    for name, group in groups.items():
        if name.startswith("LoRA"):
            points = [(run["trained"], run[key]) for run in group if run[key] is not None]
            seeds += points
            ranks += [(points[0][0], fmean(y for _, y in points))] if points else []
    if ranks:
        yield Line("LoRA on q and v, mean", *zip(*ranks, strict=True), "c0")
        yield Line("LoRA on q and v, each seed", *zip(*seeds, strict=True), "c0", "o", "")


def sections(numbers: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The parts of the page below the figure."""
    return [
        ("Loss and BLEU (Table 3)", results(numbers) + "\n" + NOTES),
        ("The learning rates", rates(numbers)),
        ("Two ranks (Figure 3)", shared_table(numbers["ranks"], KINDS) if numbers["ranks"] else ""),
        ("Two seeds (Figure 4)", shared_table(numbers["seeds"], KINDS) if numbers["seeds"] else ""),
        ("ΔW against W (Table 7)", amplification_table(numbers["amplification"]) if numbers["amplification"] else ""),
        ("What is missing", _missing(numbers)),
        ("What this cannot show", _limits(numbers)),
    ]


NOTES = """
± after a mean is half of the range over the seeds. The column *95 % over texts* is half of the 95 % interval of one
run's BLEU, from a bootstrap over the sentences. Two methods whose BLEU differs by less than that are not told apart.
SmolLM2 has no biases. For BitFit every linear layer except for the last gets one that starts at 0.
"""


def _sizes(numbers: Mapping[str, Any]) -> str:
    texts, schedule = numbers["texts"], numbers["plan"]["recipe"]["schedule"]
    return (
        f"{base_text(numbers)}. {training_text(numbers)}, {schedule} schedule; the paper trains for 5 epochs of 42,061 "
        f"texts. Rates are chosen on {texts['validation']} sentences ({texts['validation_tokens']:,} tokens). Loss: "
        f"{texts['held_out']} sentences ({texts['held_out_tokens']:,} tokens). BLEU: {texts['written']} meanings; "
        f"{numbers['base']['signature']}. Seeds: {seeds_line(numbers)}. α = 16 at every rank. {machine_text(numbers)}"
    )


def _missing(numbers: Mapping[str, Any]) -> str:
    """The cells of the plan that have no result."""
    plan, groups = numbers["plan"], variants(numbers)
    planned = [*(LABELS[method] for method in plan["rates"] if method != "lora")]
    planned += [f"LoRA r = {rank}, q and v" for rank in plan["ranks"]]
    lines = []
    for name in planned:
        seeds = {run["seed"] for run in groups.get(name, [])}
        lost = [seed for seed in plan["seeds"] if seed not in seeds]
        if lost:
            lines.append(f"- {name}: seed {listed(lost)}")
    return "\n".join(lines)


def _limits(numbers: Mapping[str, Any]) -> str:
    recipe, texts = numbers["plan"]["recipe"], numbers["texts"]
    count = recipe["steps"] * recipe["batch"]
    return f"""\
- {count:,} texts are seen, {count / max(texts["train"], 1):.2g} of an epoch. Methods that start slowly look worse than
  they are, and the differences between ranks can only be those of the beginning of training.
- One text set, one model of 135 million parameters, which its makers have tuned to follow instructions already.
- {len(seeds_of(numbers["runs"]))} seeds give at most a range, and no test. The rate of each method is chosen on one
  seed, from {max(map(len, numbers["plan"]["rates"].values()))} rates that are a factor of about three apart.
- Greedy decoding, where the paper uses a beam of 10. BLEU of sacrebleu on {texts["written"]} short meanings cannot be
  compared with the numbers of the paper's Table 3; only the order of the methods can.
- LoRA trains q and v alone, as in the paper. Prefix and bottlenecks have one size each."""


PAGE = StudyPage(
    script="nlg_study",
    name="nlg",
    reading="nlg_reading.md",
    title="Table 3 of the LoRA paper, in small",
    caption="Loss and BLEU against trained parameters",
    sizes=_sizes,
    claims=lambda numbers: claims(numbers, variants(numbers)),
    rules=RULES,
    figure=figure,
    sections=sections,
)
read, write, page = PAGE.read, PAGE.write, PAGE.text
