"""The section of ranks: the size and the error of every choice of ranks, its sliders, and the words of the advice.

The recommended rank itself comes from `loralens.compression.plan.recommended_point`.
"""

from collections.abc import Sequence
from typing import Any

from loralens.charts.curve import curve_chart
from loralens.compression.plan import LOSS, CurvePoint
from loralens.core.messages import quote_word
from loralens.reporting.document import PageTable, Paragraph, Part, Picture, PictureRow, Section, SideBySide, Slider
from loralens.reporting.result_tables import ResultTables, join_tables
from loralens.reporting.slider_stops import Stop, budget_stops, rank_stops
from loralens.reporting.subject import Subject
from loralens.tables.numbers import count, join_words, percent, size, span, unit_of

OPEN = 16  # a table of more ranks than these is folded at first; that of an adapter of rank 16 is open


def ranks_section(subjects: Sequence[Subject], tables: ResultTables) -> Section:
    """Error and size of every choice of ranks. Only subjects that have a plan get a slider, and a number for it."""
    planned = [(i, subject) for i, subject in enumerate(subjects) if subject.plan is not None]
    sliders = {
        subject.path: Slider(k, subject.label, "output kept" if subject.on_data else "energy kept")
        for k, (_, subject) in enumerate(planned)
    }
    pictures = [(subject.label, _picture(subject, i)) for i, subject in planned]
    listed = [PageTable(tables.ranks(subject), folded=len(subject.points) > OPEN) for _, subject in planned]
    parts: list[Part]
    if len(subjects) > 1:
        # The recommendations are in the first table of the page, and the sliders start at them. So an adapter gets a
        # sentence only for what these cannot show: why its rank stays, or on how many inputs an error was measured.
        columns: list[tuple[str, Sequence[Part]]] = [
            (subject.label, [sliders[subject.path]] if subject.path in sliders else [_no_ranks(subject)])
            for subject in subjects
        ]
        curves = [
            Paragraph(f"{subject.label}: {advice(subject)}")
            for _, subject in planned
            if subject.on_data or not _is_smaller(subject)
        ]
        rows: list[Part] = [PictureRow(pictures)] if pictures else []
        parts = [*curves, SideBySide(columns), *rows, *join_tables([label for label, _ in pictures], listed)]
    elif planned:
        # A single adapter has the width of the page for its picture and its table.
        figures = SideBySide([("", [pictures[0][1]]), ("", [listed[0]])])
        parts = [Paragraph(advice(subjects[0])), sliders[subjects[0].path], figures]
    else:
        parts = [_no_ranks(subjects[0])]
    lead = (
        f"The error is {_error_of(subjects)} over all modules, before rounding. No other adapter of the same ranks has "
        "a smaller error. Inference servers expect one rank for all modules. A budget gives more directions to the "
        "modules where they reduce the error most."
    )
    without = [subject.label for subject in subjects if not subject.on_data]
    # If all of them have activations, or none has, the introduction says so already.
    if 0 < len(without) < len(subjects):
        text = f"No activations were given for {join_words(without)}, so their errors are those of ΔW itself."
        parts.insert(0, Paragraph(text))
    return Section("ranks", "Which rank it needs" if len(subjects) == 1 else "Which rank they need", lead, parts)


def _no_ranks(subject: Subject) -> Paragraph:
    return Paragraph(f"No ranks to choose: {subject.no_plan}.")


def _is_smaller(subject: Subject) -> bool:
    """Whether a lower rank for all modules is recommended, because the file would be smaller."""
    best, highest = subject.recommended, subject.highest
    return bool(subject.norm and best and highest and best.uniform.bytes < subject.bytes_before)


def _error_of(subjects: Sequence[Subject]) -> str:
    """The formula of the errors in this section."""
    plain, output = "‖ΔW−ΔW'‖/‖ΔW‖", "√(E‖(ΔW−ΔW')x‖² / E‖ΔWx‖²) on the inputs given"
    measured = {subject.on_data for subject in subjects}
    both = f"{output}, or {plain} without such inputs,"
    return output if measured == {True} else plain if measured == {False} else both


def _quantity(subject: Subject) -> str:
    """The quantity of which a smaller adapter keeps a share, in words."""
    # The error is relative to √E‖ΔWx‖², so its square is the share of the squared output that is lost.
    return "the squared output on the inputs given" if subject.on_data else "the energy"


def advice(subject: Subject) -> str:
    """The recommended rank, in a sentence that gives the reason."""
    best, most = subject.recommended, subject.highest
    if best is None or most is None or not subject.norm:
        return "Nothing to recommend: every ΔW is 0."
    if best.rank >= most.rank:
        if len(subject.points) == 1:
            return f"Its rank is {most.rank}, so there is no lower one."
        below = subject.points[1]
        return (
            f"Keep rank {most.rank} for all modules: rank {below.rank} would lose {percent(below.uniform.error**2)} "
            f"of {_quantity(subject)} ({_describe_error(subject, below)}), more than the {percent(LOSS)} allowed here."
        )
    # The file of a lower rank need not be smaller, as headers and padding count too.
    if best.uniform.bytes >= subject.bytes_before:
        less = f"makes the file smaller and loses at most {percent(LOSS)} of {_quantity(subject)}"
        return f"Keep the adapter as it is: no lower rank for all modules {less}."
    saved = 1 - best.uniform.bytes / subject.bytes_before
    error = _describe_error(subject, best, subject.update_error)
    return (
        f"Rank {best.rank} of {most.rank} for all modules keeps {percent(1 - best.uniform.error**2)} of "
        f"{_quantity(subject)} ({error}) in {size(best.uniform.bytes)}, {percent(saved)} less than now."
    )


def _describe_error(subject: Subject, point: CurvePoint, update_error: float | None = None) -> str:
    """The error of a rank and what it was measured on, and the error of ΔW where that is known too."""
    # A few positions cannot stand for all inputs, so the number of them comes before the error.
    positions = f"{count(subject.positions, 'position')}; " if subject.on_data else ""
    of_update = "" if update_error is None else f"; {percent(update_error)} of ΔW itself"
    return f"{positions}error {percent(point.uniform.error)}{of_update}"


def compress_command(subject: Subject) -> str:
    """The command that makes the adapter smaller, without the rank or size, which the sliders append."""
    to = ["--to", subject.dialect.name] if subject.dialect.name != subject.examination.adapter.format else []
    # Without --uniform, compress would choose a rank for each module, which a file of one rank cannot hold.
    uniform = ["--uniform"] if subject.dialect.one_rank else []
    activations = ["--activations", quote_word(subject.activations)] if subject.activations else []
    return subject.examination.command(
        "compress", "-o", subject.examination.sibling("small"), *to, *uniform, *activations
    )


def _picture(subject: Subject, i: int) -> Picture:
    best = subject.recommended
    of = "of the output on the inputs given" if subject.on_data else "of the whole update"
    return Picture(
        f"curve-{i + 1}",
        "Error against size",
        [curve_chart(subject.points, on_data=subject.on_data, dialect=subject.dialect.name)],
        f"Error {of} against the size of the file, one point per rank. The markers show where the sliders stand.",
        "r equally strong directions would give √(1 − k/r), which is an error of 71 % at half the size",
        "Eckart & Young 1936",
        f"Error against file size of {subject.label}"
        + (f"; rank {best.rank} has an error of {percent(best.uniform.error)}." if best else "."),
    )


def slider_data(subject: Subject, i: int) -> dict[str, Any]:
    """The data of an adapter's sliders on the page: every stop in words, and its place on the curve."""
    assert subject.plan is not None
    best = subject.recommended
    uniform = rank_stops(subject.plan, subject.dialect, subject.points)
    budget = budget_stops(subject.plan, subject.dialect, subject.points)
    start = next((k for k, stop in enumerate(uniform) if best and stop.value == best.rank), 0)
    # The slider over budgets starts at the parameters of the recommended rank, so that the two can be compared at once.
    parameters = list(reversed(subject.points))[start].uniform.parameters
    near = next(k for k, stop in enumerate(budget) if stop.value >= parameters)
    before = subject.bytes_before
    # The axis of the curve is in units that suit its largest file, and the stops are marked on it.
    _, step = unit_of(max(stop.bytes for stop in uniform))
    return {
        "command": compress_command(subject),
        "picture": f"curve-{i + 1}",
        "rank": {"start": start, "stops": [_stop(stop, str(stop.value), "rank", before, step) for stop in uniform]},
        "budget": {
            "start": near,
            "stops": [_stop(stop, f"{stop.value:,} parameters", "parameters", before, step) for stop in budget],
        },
    }


def _stop(stop: Stop, value: str, option: str, before: int, step: int) -> dict[str, Any]:
    """One stop as the page shows it, of a file that has ``before`` bytes; the axis is in units of ``step`` bytes."""
    several = "s" if min(stop.ranks) < max(stop.ranks) else ""
    return {
        "value": value,
        "option": f"--{option} {stop.value}",
        "error": percent(stop.error),
        "kept": percent(1 - stop.error**2),
        "bytes": size(stop.bytes),
        "now": percent(stop.bytes / before),
        "ranks": f"rank{several} {span(stop.ranks)}",
        "at": [stop.bytes / step, 100 * stop.error],
        "chosen": list(stop.ranks),
    }
