"""The section that compares ΔW with the base weight W: amplification, intruder dimensions, and the error of a merge."""

from collections.abc import Callable, Mapping, Sequence
from itertools import starmap
from statistics import median
from typing import NamedTuple

from loralens.analysis.amplification import FAR, count_far
from loralens.analysis.merge_effect import MergeEffect
from loralens.charts.amplification import amplification_maps, excess_scale, full_rank_rows, z_scale
from loralens.charts.grid import Grid
from loralens.charts.spec import ColourScale
from loralens.core.together import magnitudes
from loralens.reporting.document import PageTable, Paragraph, Part, Picture, PictureRow, Section, SideBySide
from loralens.reporting.result_tables import ResultTables, join_tables, kinds_table
from loralens.reporting.subject import Subject
from loralens.tables.numbers import percent
from loralens.tables.table import Column, Table

# Dtypes of weights that hold an update almost exactly. For a base of such a dtype the page names the command that
# predicts the merge into a narrower dtype.
WIDE = {"float32", "float64"}
# The colours of merge errors reach at least this far: an error that does not matter must not look like a large one. The
# doctor warns from four times this error on.
LEAST_ERROR = 0.05
NEGLIGIBLE = 1e-5  # below this error a sentence says "less than 0.001 %"
Numbers = Mapping[str, int]


class KindMerges(NamedTuple):
    """One row: the predicted merges of all modules of a kind."""

    kind: str
    effects: Sequence[MergeEffect]


class MapScales(NamedTuple):
    """The colour scales that all adapters of a page share, so that their maps can be compared."""

    z: ColourScale
    excess: ColourScale
    intruders: ColourScale
    error: ColourScale


def base_section(subjects: Sequence[Subject], numbers: Numbers, base: str, tables: ResultTables) -> Section:
    """The section of the base: every adapter against the weights of its base model."""
    scales = _shared_scales(subjects)
    if len(subjects) == 1:
        # A single adapter has the width of the page: the second column begins with its second picture.
        alone = _parts(subjects[0], numbers, scales, tables)
        pictures = [k for k, part in enumerate(alone) if isinstance(part, Picture)]
        middle = pictures[1] if len(pictures) > 1 else len(alone)
        parts: list[Part] = [SideBySide([("", alone[:middle]), ("", alone[middle:])])]
    else:
        parts = _parts_of_several(subjects, numbers, scales, tables)
    lead = (
        f"Each adapter against {base}: whether ΔW amplifies directions that W already uses, whether W + ΔW has leading "
        "directions that W does not have, and how much of ΔW would survive a merge into rounded weights."
    )
    return Section("base", "Against the base", lead, parts)


def _parts(subject: Subject, numbers: Numbers, scales: MapScales, tables: ResultTables) -> list[Part]:
    """The parts of a single adapter."""
    measures = [part for measure in MEASURES for part in measure(subject, numbers, scales, tables, 0)]
    parts = [*_left_out_warnings(subject), *measures, *_not_measured(subject)]
    return parts or [Paragraph("No module of this adapter has a weight in the base.")]


def _parts_of_several(
    subjects: Sequence[Subject], numbers: Numbers, scales: MapScales, tables: ResultTables
) -> list[Part]:
    """One row of pictures for each measure, and below it one table for all adapters."""
    notes = [
        Paragraph(f"{subject.label}: {note.text}", note.warning)
        for subject in subjects
        for note in (*_left_out_warnings(subject), *_not_measured(subject))
    ]
    parts: list[Part] = []
    for measure in MEASURES:
        measured = [(subject.label, measure(subject, numbers, scales, tables, i)) for i, subject in enumerate(subjects)]
        pictures = [(label, part) for label, own in measured for part in own if isinstance(part, Picture)]
        listed = [(label, part) for label, own in measured for part in own if isinstance(part, PageTable)]
        parts += [PictureRow(pictures)] if pictures else []
        parts += join_tables([label for label, _ in listed], [part for _, part in listed])
    if not parts:
        return [*notes, Paragraph("No module of these adapters has a weight in the base.")]
    # Modules that are left out come first, so that no map is read as one of the whole adapter.
    return [*(note for note in notes if note.warning), *parts, *(note for note in notes if not note.warning)]


def _left_out_warnings(subject: Subject) -> list[Paragraph]:
    """Warnings about modules that are not compared with the base."""
    parts: list[Paragraph] = []
    # Modules that are left out come first, so that no map is read as one of the whole adapter.
    if subject.examination.unmatched:
        # The name "" stands for a reason that applies to all modules.
        unmatched = [name for name in subject.examination.unmatched if name]
        modules = f"{len(unmatched)} modules have" if unmatched else "The modules of this adapter have"
        text = f"{modules} no weight in this base and are left out here: see the findings."
        parts.append(Paragraph(text, warning=True))
    reordered = sum(reading.module.layout.rows != "" for reading in subject.examination.readings.values())
    if reordered:
        text = f"{reordered} modules have their rows in another order than the base and are left out here"
        parts.append(Paragraph(f"{text}: see the findings.", warning=True))
    return parts


def _not_measured(subject: Subject) -> list[Paragraph]:
    """What was not measured, and why."""
    parts: list[Paragraph] = []
    if subject.against_base.no_intruders:
        parts.append(Paragraph(f"Intruder dimensions were not looked for: {subject.against_base.no_intruders}."))
    # Modules that use DoRA have no predicted merge: merging them changes W by more than ΔW.
    dora = magnitudes(subject.adapter).keys() & subject.spectra
    if dora:
        share = "of the modules use" if len(dora) < len(subject.spectra) else "modules, which are all of them, use"
        text = f"{len(dora)} {share} DoRA. Run loralens merge --dry-run to measure what a merge makes of them."
        parts.append(Paragraph(text))
    return parts


def _shared_scales(subjects: Sequence[Subject]) -> MapScales:
    against = [subject.against_base for subject in subjects]
    rows = [row for measured in against for row in full_rank_rows(measured.amplified).values()]
    counts = [intruders.count for measured in against for intruders in measured.intruders.values()]
    errors = [effect.rounding.error for subject in subjects for effect in subject.merge_effects.values()]
    return MapScales(
        z_scale(rows),
        excess_scale(rows),
        # At least to 1, as a scale from 0 to 0 would have no width.
        ColourScale(0, max([*counts, 1]), "intruders among the leading directions", form=".3g"),
        ColourScale(0.0, max([*errors, LEAST_ERROR]), "error of a merge (share of ‖ΔW‖)", form=".1%"),
    )


def _amplification(subject: Subject, numbers: Numbers, scales: MapScales, tables: ResultTables, i: int) -> list[Part]:
    rows = full_rank_rows(subject.against_base.amplified)
    if not rows:
        return []
    maps = amplification_maps(rows, Grid.of(rows), scales.z, scales.excess, numbers)
    far, expected = count_far(list(rows.values()))
    return [
        Picture(
            f"amplification-{i + 1}",
            "What ΔW amplifies",
            list(maps),
            "How strong W is along the singular directions U, V of ΔW: ‖UᵀWV‖, compared with random directions.",
            "z = 0 and an excess of 1 for directions that are unrelated to W, whatever ‖ΔW‖/‖UᵀWV‖ is",
            "Hu et al. 2021, §7.3 and Table 7",
            f"Maps of what {subject.label} amplifies; {far} of {len(rows)} modules are far from chance.",
            remark=f"{far} of {len(rows)} modules are more than {FAR:g} standard deviations from chance; chance alone "
            f"would give {expected:.2g}.",
        ),
        kinds_table(tables.amplification, rows, numbers),
    ]


def _intruders(subject: Subject, numbers: Numbers, scales: MapScales, tables: ResultTables, i: int) -> list[Part]:
    intruders = subject.against_base.intruders
    if not intruders:
        return []
    grid = Grid.of(intruders)
    # All modules were tested with one threshold, so it is taken from the first.
    first = next(iter(intruders.values()))
    looked, count = subject.against_base.intruder_counts
    # The chance depends on the shape of the weight, so kinds may differ in it.
    chances = sorted(x.chance for x in intruders.values())

    def tip(name: str) -> str:
        x = intruders[name]
        return (
            f"{x.count} of {x.s.size} leading directions of W + ΔW, {percent(x.energy_share)} of their energy; "
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
            f"The number of leading directions of W + ΔW that have no |cosine| of {first.threshold:g} or more with any "
            "singular direction of W.",
            f"a random direction counts as an intruder with probability {level}: a low score means that a direction "
            "is spread over many directions of W, not that W lacks it",
            "Shuttleworth et al. 2024, Definition 3.1",
            f"Map of intruder dimensions of {subject.label}: {count} of {looked} leading directions.",
            remark=f"{count} of {looked} leading directions are intruders.",
        ),
        # A table of zeros would say nothing that the caption does not.
        *([kinds_table(tables.intruders, intruders, numbers)] if count else []),
    ]


def _merges(subject: Subject, numbers: Numbers, scales: MapScales, tables: ResultTables, i: int) -> list[Part]:
    del tables  # the table of merges is made here, as no other verb has this table
    effects = subject.merge_effects
    if not effects:
        return []
    grid = Grid.of(effects)

    def tip(name: str) -> str:
        x = effects[name]
        return (
            f"error {percent(x.rounding.error)}, {percent(x.rounding.gain)} of its strength survives, "
            f"{percent(x.rounding.unmoved)} of the weights unchanged; ‖ΔW‖/‖W‖ {percent(x.ratio)}"
        )

    # A cell of several modules shows the largest error, as a mean would hide the module that loses its update.
    values = {name: x.rounding.error for name, x in effects.items()}
    chart = grid.heat("", values, scales.error, numbers=numbers, gather=max, tip=tip)
    dtypes = sorted({x.dtype for x in effects.values()})
    wide = set(dtypes) & WIDE
    worst = subject.worst_merge
    return [
        Picture(
            f"merge-{i + 1}",
            "Merge fidelity, predicted",
            [chart],
            f"The error that a merge into {', '.join(dtypes)} weights would add, as a share of ‖ΔW‖, predicted from "
            "at most 2¹⁸ entries of each weight."
            + (" Run loralens doctor --dtype bf16 to see the same for narrower weights." if wide else ""),
            "there is no level of chance: 0 % is an exact merge, and an update below half a unit in the last place "
            "of W is lost",
            "W + ΔW is rounded to the nearest value of the dtype of the base, as in loralens merge",
            f"Map of predicted merge errors of {subject.label}, up to {percent(effects[worst].rounding.error)}.",
            remark=f"The largest error, {error_in_words(effects[worst].rounding.error)}, is that of {worst}.",
        ),
        kinds_table(
            lambda kinds: Table("Merge by kind", KIND_MERGE_COLUMNS, list(starmap(KindMerges, kinds.items()))),
            effects,
            numbers,
        ),
    ]


def error_in_words(error: float) -> str:
    """An error within a sentence, where digits in scientific notation are hard to read."""
    return "less than 0.001 %" if error < NEGLIGIBLE else percent(error)


# In the order of the page.
MEASURES: tuple[Callable[[Subject, Numbers, MapScales, ResultTables, int], list[Part]], ...] = (
    _amplification,
    _intruders,
    _merges,
)

# Columns for which one bad module spoils a merge show the worst module of a kind; the others show the median.
KIND_MERGE_COLUMNS: tuple[Column[KindMerges], ...] = (
    Column("kind", lambda row: row.kind, "kind", align="left"),
    Column("modules", lambda row: len(row.effects), "modules"),
    Column("relative_norm", lambda row: median(x.ratio for x in row.effects), "‖ΔW‖/‖W‖", percent, about="median"),
    Column(
        "gain",
        lambda row: min(x.rounding.gain for x in row.effects),
        "least strength",
        percent,
        about="⟨W'−W, ΔW⟩/‖ΔW‖² of the worst module",
    ),
    Column("error", lambda row: max(x.rounding.error for x in row.effects), "largest error", percent),
    Column(
        "unmoved",
        lambda row: median(x.rounding.unmoved for x in row.effects),
        "unmoved",
        percent,
        about="median share of weights that keep their value",
    ),
)
