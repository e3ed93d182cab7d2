"""The section of ranks: what every rank takes and loses, a slider over all choices, and a recommendation."""

from collections.abc import Sequence
from typing import Any

from loralens.charts.curve import curve_chart
from loralens.compression.curve import CurvePoint
from loralens.core.shell import quoted
from loralens.reporting.allotment import Stop, budget_stops, rank_stops
from loralens.reporting.document import Beside, PageTable, Part, Picture, Section, Slider, Text
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import LOSS, Subject
from loralens.tables.numbers import count, listed, percent, size, span, unit_of

OPEN = 16  # ranks up to which their table stands open


def section(subjects: Sequence[Subject], tables: ResultTables) -> Section:
    """Error and size of every choice of ranks; the sliders count the subjects that have a plan."""
    columns: list[tuple[str, Sequence[Part]]] = []
    sliders = 0
    for i, one in enumerate(subjects):
        if one.plan is None or not one.points:
            columns.append((one.label, [Text(f"No ranks to choose: {one.without or 'every ΔW is 0'}.")]))
            continue
        picture, table = _picture(one, i), PageTable(tables.ranks(one), folded=len(one.points) > OPEN)
        both = [picture, table] if len(subjects) > 1 else [Beside([("", [picture]), ("", [table])])]
        columns.append(
            (
                one.label,
                [Text(advice(one)), Slider(sliders, one.label, "output kept" if one.on_data else "energy kept"), *both],
            )
        )
        sliders += 1
    lead = (
        f"The error is {_error_of(subjects)} over all modules, before rounding; nothing smaller of the same ranks has "
        "less. One rank everywhere is what servers want; a budget puts directions where they save most."
    )
    parts = [*_unmeasured(subjects), *(columns[0][1] if len(columns) == 1 else [Beside(columns)])]
    return Section("ranks", "Which rank it needs" if len(subjects) == 1 else "Which rank they need", lead, parts)


def _error_of(subjects: Sequence[Subject]) -> str:
    """What the errors of the section are errors of."""
    plain, output = "‖ΔW−ΔW'‖/‖ΔW‖", "√(E‖(ΔW−ΔW')x‖² / E‖ΔWx‖²) on the inputs given"
    measured = {one.on_data for one in subjects}
    return output if measured == {True} else plain if measured == {False} else f"{output}, without them {plain},"


def _unmeasured(subjects: Sequence[Subject]) -> list[Part]:
    """Which adapters no activations belong to, where others have some."""
    without = [one.label for one in subjects if not one.on_data]
    if not without or len(without) == len(subjects):
        return []
    return [Text(f"No activations stand behind {listed(without)}: errors there are those of ΔW itself.")]


def kept_of(one: Subject) -> str:
    """What a smaller adapter keeps a share of."""
    if not one.on_data:
        return "the energy"
    return "the squared output on the inputs given"


def advice(one: Subject) -> str:
    """What rank is recommended, in a sentence that says why."""
    best, most = one.recommended, one.most
    if best is None or most is None or not one.norm:
        return "Nothing to recommend: every ΔW is 0."
    whole = most.uniform.bytes
    if best.rank >= most.rank:
        return _kept_whole(one, most)
    if best.uniform.bytes >= whole:
        less = f"makes a smaller file and loses at most {percent(LOSS)} of {kept_of(one)}"
        return f"Keep it as it is: no smaller rank for all modules {less}."
    saved = 1 - best.uniform.bytes / whole
    return (
        f"Rank {best.rank} of {most.rank} for all modules keeps {percent(1 - best.uniform.error**2)} of "
        f"{kept_of(one)} ({_error_said(one, best, one.plain)}) in {size(best.uniform.bytes)}, "
        f"{percent(saved)} less than now."
    )


def _error_said(one: Subject, point: CurvePoint, plain: float | None = None) -> str:
    """The error of a rank, what it was measured on, and that of ΔW where it is known too."""
    on = f"{count(one.positions, 'position')}; " if one.on_data else ""
    beside = "" if plain is None else f"; {percent(plain)} of ΔW itself"
    return f"{on}error {percent(point.uniform.error)}{beside}"


def _kept_whole(one: Subject, most: CurvePoint) -> str:
    """Why no rank below the highest is recommended."""
    below = max((p for p in one.points if p.rank < most.rank), key=lambda p: p.rank, default=None)
    if below is None:
        return f"Its rank is {most.rank}: there is none below."
    return (
        f"Keep rank {most.rank} for all modules: rank {below.rank} would lose {percent(below.uniform.error**2)} of "
        f"{kept_of(one)} ({_error_said(one, below)}), more than the {percent(LOSS)} allowed here."
    )


def command(one: Subject) -> str:
    """What makes it smaller, but for the rank or size."""
    to = ["--to", one.dialect.name] if one.dialect.name != one.patient.adapter.format else []
    uniform = ["--uniform"] if one.dialect.one_rank else []
    activations = ["--activations", quoted(one.activations)] if one.activations else []
    return one.patient.command("compress", "-o", one.patient.sibling("small"), *to, *uniform, *activations)


def _picture(one: Subject, i: int) -> Picture:
    best = one.recommended
    of = "of the output on the inputs given" if one.on_data else "of the whole update"
    return Picture(
        f"curve-{i + 1}",
        "Error against size",
        [curve_chart(one.points, on_data=one.on_data, dialect=one.dialect.name)],
        f"Error {of} over the size of the file, a point a rank; the markers are where the sliders stand.",
        "r equal directions would give √(1 − k/r): at half the size an error of 71 %",
        "Eckart & Young 1936",
        f"Error against file size of {one.label}"
        + (f"; rank {best.rank} has an error of {percent(best.uniform.error)}." if best else "."),
    )


def slider(one: Subject, i: int) -> dict[str, Any]:
    """What the page carries of the sliders of an adapter: every stop in words, and its place on the curve."""
    assert one.plan is not None
    best, form = one.recommended, one.form
    uniform, budget = (
        rank_stops(one.plan, one.dialect, one.points),
        budget_stops(one.plan, one.dialect, one.points, form),
    )
    start = next((k for k, stop in enumerate(uniform) if best and stop.value == best.rank), 0)
    near = next((k for k, stop in enumerate(budget) if stop.value >= uniform[start].bytes), len(budget) - 1)
    whole = max(stop.bytes for stop in uniform)
    _, step = unit_of(whole)
    about = "" if form else "about "
    return {
        "command": command(one),
        "picture": f"curve-{i + 1}",
        "rank": {"start": start, "stops": [_stop(stop, str(stop.value), "rank", whole, step) for stop in uniform]},
        "budget": {
            "start": near,
            "stops": [_stop(stop, size(stop.value), "size", whole, step, about) for stop in budget],
        },
    }


def _stop(stop: Stop, value: str, option: str, whole: int, step: int, about: str = "") -> dict[str, Any]:
    """One stop as the page shows it; ``step`` bytes are one unit of the curve."""
    several = "s" if min(stop.ranks) < max(stop.ranks) else ""
    return {
        "value": value,
        "option": f"--{option} {stop.value}",
        "error": about + percent(stop.error),
        "kept": about + percent(1 - stop.error**2),
        "bytes": about + size(stop.bytes),
        "now": percent(stop.bytes / whole),
        "ranks": f"rank{several} {span(stop.ranks)}",
        "at": [stop.bytes / step, 100 * stop.error],
        "chosen": list(stop.ranks),
    }
