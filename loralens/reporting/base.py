"""The section of the base: what ΔW amplifies of W, what is new in W + ΔW, and what a merge would make of ΔW."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple, TypeVar

from loralens.analysis.base.amplification import FAR, Amplification, count_far
from loralens.analysis.base.intruders import Intruders
from loralens.analysis.checks.base import MergeEffect
from loralens.charts.amplification import amplification_maps, excess_scale, whole_rank, z_scale
from loralens.charts.grid import Grid
from loralens.charts.spec import Scale
from loralens.core.carried import magnitudes
from loralens.core.names import kind, natural_key
from loralens.reporting.document import Beside, PageTable, Part, Picture, Section, Text
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import Subject
from loralens.tables.numbers import percent
from loralens.tables.table import Column, Table

WIDE = {"float32", "float64"}  # dtypes of weights in which an update arrives as it is
Numbers = Mapping[str, int]
Value = TypeVar("Value")


class KindLanding(NamedTuple):
    """One row: what the weights of a kind make of its updates."""

    kind: str
    landings: Sequence[MergeEffect]


class Scales(NamedTuple):
    """Colours that all adapters of a page share."""

    z: Scale
    excess: Scale
    intruders: Scale
    error: Scale


def section(subjects: Sequence[Subject], numbers: Numbers, base: str, tables: ResultTables) -> Section:
    """All that the base says of every adapter."""
    scales = _scales(subjects)
    columns = [(one.label, _parts(one, numbers, scales, tables, i)) for i, one in enumerate(subjects)]
    if len(columns) == 1:
        columns = [("", [_in_two(columns[0][1])])]
    lead = (
        f"Against {base}: whether ΔW strengthens what W does already or something else, whether W + ΔW has leading "
        "directions that W has not, and how much of ΔW would arrive in narrow weights."
    )
    parts = list(columns[0][1]) if len(columns) == 1 else [Beside(columns)]
    return Section("base", "Beside the base", lead, parts)


def _parts(one: Subject, numbers: Numbers, scales: Scales, tables: ResultTables, i: int) -> list[Part]:
    parts: list[Part] = []
    if one.patient.unmatched:
        fewer = [name for name in one.patient.unmatched if name]
        what = f"{len(fewer)} modules have" if fewer else "Its modules have"
        parts.append(Text(f"{what} no weight in this base and are left out here: see the findings.", warning=True))
    turned = sum(reading.module.layout.rows != "" for reading in one.patient.readings.values())
    if turned:
        told = f"The rows of {turned} modules are in another order than the base's, so these are left out here"
        parts.append(Text(f"{told}: see the findings.", warning=True))
    if one.beside:
        parts += _amplified(one, one.beside.amplified, numbers, scales, tables, i)
        parts += _intruders(one, one.beside.intruders, numbers, scales, tables, i)
        if one.beside.without:
            parts.append(Text(f"Intruder dimensions were not looked for: {one.beside.without}."))
    parts += _landings(one, numbers, scales, i)
    bent = magnitudes(one.adapter).keys() & one.spectra
    if bent:
        said = "of its modules are" if len(bent) < len(one.spectra) else "modules, all of them, are"
        parts.append(Text(f"{len(bent)} {said} DoRA: what a merge makes of them, loralens merge --dry-run measures."))
    return parts or [Text("No module of this adapter has a weight in the base.")]


def _in_two(parts: Sequence[Part]) -> Beside:
    """The parts of one adapter in two columns, from the second picture on in the second."""
    pictures = [k for k, part in enumerate(parts) if isinstance(part, Picture)]
    middle = pictures[1] if len(pictures) > 1 else len(parts)
    return Beside([("", list(parts[:middle])), ("", list(parts[middle:]))])


def _scales(subjects: Sequence[Subject]) -> Scales:
    rows = [row for one in subjects if one.beside for row in whole_rank(one.beside.amplified).values()]
    counts = [i.count for one in subjects if one.beside and one.beside.intruders for i in one.beside.intruders.values()]
    errors = [landing.rounding.error for one in subjects for landing in one.landings.values()]
    return Scales(
        z_scale(rows),
        excess_scale(rows),
        Scale(0, max([*counts, 1]), "intruders among the leading directions", form=".3g"),
        Scale(0.0, max([*errors, 0.05]), "error of a merge (share of ‖ΔW‖)", form=".1%"),
    )


def _amplified(
    one: Subject,
    found: Mapping[str, Amplification],
    numbers: Numbers,
    scales: Scales,
    tables: ResultTables,
    i: int,
) -> list[Part]:
    rows = whole_rank(found)
    if not rows:
        return []
    maps = amplification_maps(rows, Grid.of(rows), scales.z, scales.excess, numbers)
    far, expected = count_far(list(rows.values()))
    return [
        Picture(
            f"amplification-{i + 1}",
            "What ΔW amplifies",
            list(maps),
            "How much of W lies along the singular directions U, V of ΔW: ‖UᵀWV‖, beside what random directions would "
            f"catch. {far} of {len(rows)} modules are beyond {FAR:g} standard deviations, where chance gives "
            f"{expected:.2g}.",
            "z = 0 and an excess of 1: directions that know nothing of W, whatever ‖ΔW‖/‖UᵀWV‖ is",
            "Hu et al. 2021, §7.3 and Table 7",
            f"Maps of what {one.label} amplifies; {far} of {len(rows)} modules are far from chance.",
        ),
        _by_kind(tables.amplification, rows, numbers),
    ]


def _by_kind(
    table: Callable[[Mapping[str, Sequence[Value]]], Table[Any]], values: Mapping[str, Value], numbers: Numbers
) -> PageTable:
    """A table of kinds, made of the values of their modules."""
    members: dict[str, list[str]] = {}
    for name in sorted(values, key=lambda name: natural_key(kind(name))):
        members.setdefault(kind(name), []).append(name)
    rows = {label: [values[name] for name in names] for label, names in members.items()}
    return PageTable(table(rows), [[numbers[name] for name in names] for names in members.values()])


def _intruders(
    one: Subject,
    found: Mapping[str, Intruders] | None,
    numbers: Numbers,
    scales: Scales,
    tables: ResultTables,
    i: int,
) -> list[Part]:
    if not found:
        return []
    grid = Grid.of(found)
    first = next(iter(found.values()))
    looked, count = sum(x.s.size for x in found.values()), sum(x.count for x in found.values())
    chances = sorted(x.chance for x in found.values())

    def tip(name: str) -> str:
        x = found[name]
        return (
            f"{name}: {x.count} of {x.s.size} leading directions of W + ΔW, {percent(x.energy_share)} of their energy; "
            f"lowest score {x.scores.min(initial=1.0):.2f}"
        )

    values = {name: float(x.count) for name, x in found.items()}
    chart = grid.heat("", values, scales.intruders, numbers=numbers, gather=sum, tip=tip)
    level = percent(chances[0]) + (f" to {percent(chances[-1])}" if chances[-1] > chances[0] else "")
    return [
        Picture(
            f"intruders-{i + 1}",
            "Intruder dimensions",
            [chart],
            f"{count} of the {looked} leading directions of W + ΔW have no |cosine| of {first.threshold:g} or more "
            "with any singular direction of W.",
            f"a random direction is called an intruder with probability {level}: a low score means spread over many "
            "directions of W, not unknown to it",
            "Shuttleworth et al. 2024, Definition 3.1",
            f"Map of intruder dimensions of {one.label}: {count} of {looked} leading directions.",
        ),
        *([_by_kind(tables.intruders, found, numbers)] if count else []),
    ]


def _landings(one: Subject, numbers: Numbers, scales: Scales, i: int) -> list[Part]:
    found = one.landings
    if not found:
        return []
    grid = Grid.of(found)

    def tip(name: str) -> str:
        x = found[name]
        return (
            f"{name}: error {percent(x.rounding.error)}, {percent(x.rounding.gain)} of its strength arrives, "
            f"{percent(x.rounding.unmoved)} of the weights unmoved; ‖ΔW‖/‖W‖ {percent(x.ratio)}"
        )

    values = {name: x.rounding.error for name, x in found.items()}
    chart = grid.heat("", values, scales.error, numbers=numbers, gather=max, tip=tip)
    dtypes = sorted({x.dtype for x in found.values()})
    wide = set(dtypes) & WIDE
    worst = max(found, key=lambda name: found[name].rounding.error)
    return [
        Picture(
            f"merge-{i + 1}",
            "Merge fidelity, predicted",
            [chart],
            f"How far ΔW would be off in weights that are {', '.join(dtypes)}, as a share of ‖ΔW‖, predicted from "
            f"at most 2¹⁸ entries of each; the worst is {worst}."
            + (" loralens doctor --dtype bf16 says what narrower weights would make of it." if wide else ""),
            "no chance level: 0 % arrives as it is; an update below half a unit in the last place of W does not arrive",
            "rounding of W + ΔW to the nearest in the dtype of the base, as loralens merge does it",
            f"Map of predicted merge errors of {one.label}, up to {percent(found[worst].rounding.error)}.",
        ),
        _by_kind(_landings_table, found, numbers),
    ]


def _landings_table(kinds: Mapping[str, Sequence[MergeEffect]]) -> Table[KindLanding]:
    rows = [KindLanding(name, members) for name, members in kinds.items()]
    return Table("Merge by kind", LANDING_COLUMNS, rows)


LANDING_COLUMNS: tuple[Column[KindLanding], ...] = (
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
