"""The section that compares ΔW with the base weight W: amplification, intruder dimensions, and the error of a merge."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple, TypeVar

from loralens.analysis.base.amplification import FAR, Amplification, count_far
from loralens.analysis.base.intruders import Intruders
from loralens.analysis.checks.base import MergeEffect
from loralens.charts.amplification import amplification_maps, excess_scale, full_rank_rows, z_scale
from loralens.charts.grid import Grid
from loralens.charts.spec import ColourScale
from loralens.core.carried import magnitudes
from loralens.core.names import kind, natural_key
from loralens.reporting.document import PageTable, Paragraph, Part, Picture, Section, SideBySide
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import Subject
from loralens.tables.numbers import percent
from loralens.tables.table import Column, Table

# Dtypes of weights that hold an update almost exactly: for these the page points to the check of narrower ones.
WIDE = {"float32", "float64"}
# The colours of merge errors reach at least this far: an error that does not matter must not look like a large one.
LEAST_ERROR = 0.05
Numbers = Mapping[str, int]
Value = TypeVar("Value")


class KindMerges(NamedTuple):
    """One row: the predicted merges of all modules of a kind."""

    kind: str
    landings: Sequence[MergeEffect]


class MapScales(NamedTuple):
    """The colour scales that all adapters of a page share, so that their maps can be compared."""

    z: ColourScale
    excess: ColourScale
    intruders: ColourScale
    error: ColourScale


def base_section(subjects: Sequence[Subject], numbers: Numbers, base: str, tables: ResultTables) -> Section:
    """The section of the base: every adapter against the weights of its base model."""
    scales = _shared_scales(subjects)
    columns = [(subject.label, _parts(subject, numbers, scales, tables, i)) for i, subject in enumerate(subjects)]
    if len(columns) == 1:
        columns = [("", [_two_columns(columns[0][1])])]
    lead = (
        f"Each adapter against {base}: whether ΔW amplifies directions that W already uses, whether W + ΔW has leading "
        "directions that W does not have, and how much of ΔW would survive a merge into rounded weights."
    )
    parts = list(columns[0][1]) if len(columns) == 1 else [SideBySide(columns)]
    return Section("base", "Against the base", lead, parts)


def _parts(subject: Subject, numbers: Numbers, scales: MapScales, tables: ResultTables, i: int) -> list[Part]:
    parts: list[Part] = []
    if subject.patient.unmatched:
        fewer = [name for name in subject.patient.unmatched if name]
        what = f"{len(fewer)} modules have" if fewer else "The modules of this adapter have"
        parts.append(Paragraph(f"{what} no weight in this base and are left out here: see the findings.", warning=True))
    turned = sum(reading.module.layout.rows != "" for reading in subject.patient.readings.values())
    if turned:
        reordered = f"{turned} modules have their rows in another order than the base and are left out here"
        parts.append(Paragraph(f"{reordered}: see the findings.", warning=True))
    if subject.against_base:
        parts += _amplified(subject, subject.against_base.amplified, numbers, scales, tables, i)
        parts += _intruders(subject, subject.against_base.intruders, numbers, scales, tables, i)
        if subject.against_base.without:
            parts.append(Paragraph(f"Intruder dimensions were not looked for: {subject.against_base.without}."))
    parts += _landings(subject, numbers, scales, i)
    dora = magnitudes(subject.adapter).keys() & subject.spectra
    if dora:
        share = "of the modules use" if len(dora) < len(subject.spectra) else "modules, which are all of them, use"
        parts.append(
            Paragraph(f"{len(dora)} {share} DoRA. Run loralens merge --dry-run to measure what a merge makes of them.")
        )
    return parts or [Paragraph("No module of this adapter has a weight in the base.")]


def _two_columns(parts: Sequence[Part]) -> SideBySide:
    """The parts of one adapter in two columns; the second begins with the second picture."""
    pictures = [k for k, part in enumerate(parts) if isinstance(part, Picture)]
    middle = pictures[1] if len(pictures) > 1 else len(parts)
    return SideBySide([("", list(parts[:middle])), ("", list(parts[middle:]))])


def _shared_scales(subjects: Sequence[Subject]) -> MapScales:
    rows = [
        row
        for subject in subjects
        if subject.against_base
        for row in full_rank_rows(subject.against_base.amplified).values()
    ]
    counts = [
        i.count
        for subject in subjects
        if subject.against_base and subject.against_base.intruders
        for i in subject.against_base.intruders.values()
    ]
    errors = [landing.rounding.error for subject in subjects for landing in subject.landings.values()]
    return MapScales(
        z_scale(rows),
        excess_scale(rows),
        ColourScale(0, max([*counts, 1]), "intruders among the leading directions", form=".3g"),
        ColourScale(0.0, max([*errors, LEAST_ERROR]), "error of a merge (share of ‖ΔW‖)", form=".1%"),
    )


def _amplified(
    subject: Subject,
    amplified: Mapping[str, Amplification],
    numbers: Numbers,
    scales: MapScales,
    tables: ResultTables,
    i: int,
) -> list[Part]:
    rows = full_rank_rows(amplified)
    if not rows:
        return []
    maps = amplification_maps(rows, Grid.of(rows), scales.z, scales.excess, numbers)
    far, expected = count_far(list(rows.values()))
    return [
        Picture(
            f"amplification-{i + 1}",
            "What ΔW amplifies",
            list(maps),
            "How strong W is along the singular directions U, V of ΔW: ‖UᵀWV‖, compared with random directions. "
            f"{far} of {len(rows)} modules are more than {FAR:g} standard deviations from chance; chance alone would "
            f"give {expected:.2g}.",
            "z = 0 and an excess of 1 for directions that are unrelated to W, whatever ‖ΔW‖/‖UᵀWV‖ is",
            "Hu et al. 2021, §7.3 and Table 7",
            f"Maps of what {subject.label} amplifies; {far} of {len(rows)} modules are far from chance.",
        ),
        _by_kind(tables.amplification, rows, numbers),
    ]


def _by_kind(
    table: Callable[[Mapping[str, Sequence[Value]]], Table[Any]], values: Mapping[str, Value], numbers: Numbers
) -> PageTable:
    """A table with one row per kind, made from the values of its modules."""
    members: dict[str, list[str]] = {}
    for name in sorted(values, key=lambda name: natural_key(kind(name))):
        members.setdefault(kind(name), []).append(name)
    rows = {label: [values[name] for name in names] for label, names in members.items()}
    return PageTable(table(rows), [[numbers[name] for name in names] for names in members.values()])


def _intruders(
    subject: Subject,
    intruders: Mapping[str, Intruders] | None,
    numbers: Numbers,
    scales: MapScales,
    tables: ResultTables,
    i: int,
) -> list[Part]:
    if not intruders:
        return []
    grid = Grid.of(intruders)
    first = next(iter(intruders.values()))
    looked, count = sum(x.s.size for x in intruders.values()), sum(x.count for x in intruders.values())
    chances = sorted(x.chance for x in intruders.values())

    def tip(name: str) -> str:
        x = intruders[name]
        return (
            f"{name}: {x.count} of {x.s.size} leading directions of W + ΔW, {percent(x.energy_share)} of their energy; "
            f"lowest score {x.scores.min(initial=1.0):.2f}"
        )

    values = {name: float(x.count) for name, x in intruders.items()}
    chart = grid.heat("", values, scales.intruders, numbers=numbers, gather=sum, tip=tip)
    level = percent(chances[0]) + (f" to {percent(chances[-1])}" if chances[-1] > chances[0] else "")
    return [
        Picture(
            f"intruders-{i + 1}",
            "Intruder dimensions",
            [chart],
            f"{count} of the {looked} leading directions of W + ΔW have no |cosine| of {first.threshold:g} or more "
            "with any singular direction of W.",
            f"a random direction counts as an intruder with probability {level}: a low score means that a direction "
            "is spread over many directions of W, not that W lacks it",
            "Shuttleworth et al. 2024, Definition 3.1",
            f"Map of intruder dimensions of {subject.label}: {count} of {looked} leading directions.",
        ),
        *([_by_kind(tables.intruders, intruders, numbers)] if count else []),
    ]


def _landings(subject: Subject, numbers: Numbers, scales: MapScales, i: int) -> list[Part]:
    landings = subject.landings
    if not landings:
        return []
    grid = Grid.of(landings)

    def tip(name: str) -> str:
        x = landings[name]
        return (
            f"{name}: error {percent(x.rounding.error)}, {percent(x.rounding.gain)} of its strength survives, "
            f"{percent(x.rounding.unmoved)} of the weights unmoved; ‖ΔW‖/‖W‖ {percent(x.ratio)}"
        )

    values = {name: x.rounding.error for name, x in landings.items()}
    chart = grid.heat("", values, scales.error, numbers=numbers, gather=max, tip=tip)
    dtypes = sorted({x.dtype for x in landings.values()})
    wide = set(dtypes) & WIDE
    worst = max(landings, key=lambda name: landings[name].rounding.error)
    return [
        Picture(
            f"merge-{i + 1}",
            "Merge fidelity, predicted",
            [chart],
            f"The error that a merge into {', '.join(dtypes)} weights would add, as a share of ‖ΔW‖, predicted from "
            f"at most 2¹⁸ entries of each weight. The largest is that of {worst}."
            + (" Run loralens doctor --dtype bf16 to see the same for narrower weights." if wide else ""),
            "there is no level of chance: 0 % is an exact merge, and an update below half a unit in the last place "
            "of W is lost",
            "W + ΔW is rounded to the nearest value of the dtype of the base, as in loralens merge",
            f"Map of predicted merge errors of {subject.label}, up to {percent(landings[worst].rounding.error)}.",
        ),
        _by_kind(_landings_table, landings, numbers),
    ]


def _landings_table(kinds: Mapping[str, Sequence[MergeEffect]]) -> Table[KindMerges]:
    rows = [KindMerges(name, members) for name, members in kinds.items()]
    return Table("Merge by kind", LANDING_COLUMNS, rows)


LANDING_COLUMNS: tuple[Column[KindMerges], ...] = (
    Column("kind", lambda row: row.kind, "kind", align="left"),
    Column("modules", lambda row: len(row.landings), "modules"),
    Column(
        "relative_norm",
        lambda row: median(landing.ratio for landing in row.landings),
        "‖ΔW‖/‖W‖",
        percent,
        about="median",
    ),
    Column(
        "gain",
        lambda row: min(landing.rounding.gain for landing in row.landings),
        "least strength",
        percent,
        about="⟨W'−W, ΔW⟩/‖ΔW‖² of the worst module",
    ),
    Column("error", lambda row: max(landing.rounding.error for landing in row.landings), "largest error", percent),
    Column(
        "unmoved",
        lambda row: median(landing.rounding.unmoved for landing in row.landings),
        "unmoved",
        percent,
        about="median share of weights that keep their value",
    ),
)
