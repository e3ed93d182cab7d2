"""The sections about each adapter: findings, facts, quality, spectra, ranks, the base, and every module."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, TypeVar

from loralens.analysis.amplification import FAR, KeptRank, count_far
from loralens.analysis.diagnosis import LEVELS, Diagnosis, by_cause
from loralens.analysis.intruders import Intruders
from loralens.analysis.merge_effect import MergeEffect
from loralens.analysis.spectrum import mean_effective_rank
from loralens.charts.amplification_charts import amplification_maps, excess_scale, full_rank_rows, z_scale
from loralens.charts.module_grid import Grid, all_blocks, fit_name
from loralens.charts.spec import ColourScale
from loralens.charts.spectrum_charts import (
    curve_chart,
    effective_rank_map,
    effective_rank_scale,
    energy_chart,
    energy_map,
    energy_scale,
    singular_value_limits,
    singular_value_panels,
)
from loralens.compression.truncation_plan import LOSS, Choice, CurvePoint
from loralens.core.base_model import group_models
from loralens.core.messages import quote_word
from loralens.core.names import kind, some
from loralens.core.together import NORMS, magnitudes
from loralens.reporting.document import Notice, Notices, PageTable, Panel, Paragraph, Part, Picture, Section, Slider
from loralens.reporting.subject import OPEN, Subject, joined_tables
from loralens.tables.numbers import count, join_words, number, percent, size, span, unit_of
from loralens.tables.table import Column, Table

# The number of modules whose evidence a finding shows. The others are counted, because their evidence differs in its
# numbers only. `loralens doctor` shows the evidence of the same number of modules.
SHOWN = 3
KINDS = 8  # kinds of modules that are listed by name, those with the most modules: a decoder block has seven
LONG = 160  # letters of the name of a base model, which may be a long path
KIND = 40  # letters of a kind within a sentence: that of a module outside blocks may be its whole name


def findings_section(subjects: Sequence[Subject], findings: Sequence[Diagnosis], base: str | None) -> Section:
    """The section of the doctor's findings, most serious first; modules with the same finding share one notice."""
    notices = [_notice(same, subjects) for same in by_cause(findings)]
    levels = Counter(notice.level for notice in notices)
    counts = ", ".join(count(levels[level], level) for level in LEVELS if levels[level])
    against = f", checked against {base}" if base else ""
    meaning = "An error means that the adapter does not work as it is, a warning that it may not do what was intended."
    lead = f"{counts}{against}. {meaning}" if counts else f"Checked against {base}." if base else ""
    if len(subjects) > 1:
        # Notices of several adapters that have the same level and code stand together, at the place of the first.
        groups: dict[tuple[str, str], list[Notice]] = {}
        for notice in notices:
            groups.setdefault((notice.level, notice.code), []).append(notice)
        notices = [
            same[0] if len(same) == 1 else Notice(same[0].level, same[0].code, "", (), each=same)
            for same in groups.values()
        ]
    good = "The doctor found nothing to report: no dead, damaged, wrongly scaled or over-ranked module."
    parts: list[Part] = [Notices(notices, good)]
    # Said here and not in every section, as the error of the doctor on these modules stands just above.
    non_finite = [f"{subject.label}: {some(list(subject.non_finite))}" for subject in subjects if subject.non_finite]
    if non_finite:
        text = f"Left out of everything below because they hold NaN or Inf: {'; '.join(non_finite)}."
        parts.append(Paragraph(text, warning=True))
    return Section("findings", "Findings", lead, parts)


def _notice(same: Sequence[Diagnosis], subjects: Sequence[Subject]) -> Notice:
    first, label = same[0], ""
    own = {subject.path: subject for subject in subjects}
    # A single adapter needs no name.
    if len(subjects) > 1:
        paths = dict.fromkeys(finding.adapter for finding in same)
        adapters = [own[path].label if path in own else path for path in paths]
        label = f"all {len(subjects)} adapters" if len(adapters) == len(subjects) else some(adapters, 4)
    modules = [finding.module for finding in same if finding.module]
    total = len(own[first.adapter].examination.readings) if first.adapter in own else 0
    place = modules[0] if len(modules) == 1 else f"{len(modules)} of {total} modules" if modules else ""
    kinds = {kind(name) for name in modules}
    if len(modules) > 1 and len(kinds) == 1:
        place += f", all {fit_name(kinds.pop(), KIND)}"
    # A single module is named by the place, so its evidence need not repeat the name.
    named = len(modules) > 1
    texts = list(dict.fromkeys(f"{x.module}: {x.evidence}" if named and x.module else x.evidence for x in same))
    evidence = texts[:SHOWN] + ([f"and {len(texts) - SHOWN} more like these"] if len(texts) > SHOWN else [])
    return Notice(first.level, first.code, " · ".join(filter(None, (label, place))), evidence, first.fix)


def facts_section(subjects: Sequence[Subject]) -> Section:
    """The section that says what each adapter is: one fact per row, one adapter per column."""
    facts = [_facts(subject) for subject in subjects]
    names = list(dict.fromkeys(name for own in facts for name in own))
    # Titles of one space: a column without a title would not be shown at all.
    columns: list[Column[str]] = [Column("fact", lambda name: name, " ", align="left")]
    for subject, own in zip(subjects, facts, strict=True):
        columns.append(Column(subject.label, own.get, subject.label or " ", align="left"))
    parts: list[Part] = [PageTable(Table("", columns, names))]
    models = [subject.examination.named for subject in subjects]
    groups = group_models(models)
    if len(groups) > 1:
        of = "; ".join(
            f"{join_words([subjects[i].label for i in group])}: {fit_name(models[group[0]].name, LONG)}"
            for group in groups
        )
        consequence = "Updates of different bases cannot be compared; the comparisons below assume one base for all."
        parts.append(Paragraph(f"The adapters name different base models ({of}). {consequence}", warning=True))
    return Section("identity", "What it is" if len(subjects) == 1 else "What they are", "", parts)


def _facts(subject: Subject) -> dict[str, str]:
    adapter, readings = subject.examination.adapter, subject.examination.readings
    modules = [reading.module for reading in readings.values()]
    scales = Counter((module.scale, str(module.scaling)) for module in modules)
    kinds = Counter(map(kind, readings))
    # Magnitudes that were taken from the base are not tensors of the file.
    extra = Counter(extra.role for extra in adapter.extra.values() if extra.role not in NORMS)
    extra_bytes = sum(extra.tensor.nbytes for extra in adapter.extra.values())
    facts = {
        "file": subject.path,
        "format": adapter.format,
        "base model": fit_name(adapter.base_model or "not named", LONG),
        "modules": count(len(modules), "module")
        + (f" of {len(adapter)}" if len(modules) < len(adapter) else "")
        + (f", {len(subject.non_finite)} left out" if subject.non_finite else ""),
        "kinds": ", ".join(f"{fit_name(name, KIND)} ({times})" for name, times in kinds.most_common(KINDS))
        + (f" and {len(kinds) - KINDS} more" if len(kinds) > KINDS else ""),
        "rank r": span([module.rank for module in modules]),
        # With its source: a scale that a file states is more certain than one that its dialect assumes.
        "scale": "; ".join(f"{number(scale)} ({source})" for (scale, source), _ in scales.most_common(2))
        + (f" and {len(scales) - 2} more" if len(scales) > 2 else ""),
        "dtype": ", ".join(sorted({str(module.dtype) for module in modules})),
        "parameters": f"{adapter.parameters:,} in pairs",
        "size": size(adapter.nbytes),
        "‖ΔW‖": number(subject.norm if subject.spectra else None),
    }
    if subject.spectra and subject.norm:
        modules_half = half_energy_modules(subject)
        facts["half of the energy"] = f"in {modules_half} of {count(len(subject.spectra), 'module')}"
        facts["effective rank"] = f"{mean_effective_rank(subject.spectra.values()):.1f} on average"
    if extra:
        roles = ", ".join(f"{times} {role}" for role, times in extra.items())
        facts["other tensors"] = f"{roles} tensors, {size(extra_bytes)}; they are not measured here"
    return facts


def quality_section(tables: Sequence[Table[object]]) -> Section:
    """The section of what was measured on texts, with one table for each evaluation."""
    lead = (
        "The model was run on texts with each adapter. The results show how well it does the task; the sections below "
        "describe the adapters themselves."
    )
    return Section("quality", "Quality on texts", lead, list(map(PageTable, tables)))


def modules_section(subjects: Sequence[Subject]) -> Section:
    """The section of all modules: one table per adapter."""
    tables = [subject.tables["modules"] for subject in subjects]
    parts = [PageTable(table, folded=len(table.rows) > OPEN["modules"]) for table in tables]
    lead = "Click a column heading to sort. The filter at the top of the page selects modules."
    return Section("modules", "Every module", lead, parts)


def spectra_section(subjects: Sequence[Subject]) -> Section:
    """The section of spectra; all adapters share limits and colours, so that they can be compared."""
    measured = [subject for subject in subjects if subject.spectra]
    # Limits, colours and columns come from all adapters, and only then each is drawn. A block has the same column in
    # every map, also in that of an adapter that was trained on some blocks only.
    limits = singular_value_limits(subject.spectra for subject in measured)
    blocks = all_blocks(name for subject in measured for name in subject.spectra)
    grids = [Grid.of(subject.spectra, subject.shares, blocks=blocks) for subject in measured]
    rank = effective_rank_scale(subject.spectra for subject in measured)
    share = energy_scale(grids, [subject.shares for subject in measured])
    # Where every ΔW is 0, the maps would be crossed out from end to end.
    mapped = [grid if subject.norm else None for subject, grid in zip(measured, grids, strict=True)]

    def draw_values(subject: Subject, grid: Grid) -> Panel:
        zero = sum(not spectrum.spectral for spectrum in subject.spectra.values())
        remark = f"ΔW is 0 in {count(zero, 'module')}: there is no line." if zero else ""
        return Panel("", singular_value_panels(subject.spectra, grid, limits), remark, grid.ramp)

    def draw_ranks(subject: Subject, grid: Grid) -> Panel:
        remark = f"Nominal rank r = {span([s.rank for s in subject.spectra.values()])}."
        return Panel("", [effective_rank_map(subject.spectra, grid, rank)], remark)

    def draw_shares(subject: Subject, grid: Grid) -> Panel:
        total = len(subject.spectra)
        half = f"{half_energy_modules(subject)} of {total} modules hold half of it." if total > 1 else ""
        return Panel("", [energy_map(subject.spectra, subject.shares, grid, share)], half)

    totals = sorted({len(subject.spectra) for subject in measured})
    even = " or ".join(f"{percent(1 / total)} each over {count(total, 'module')}" for total in totals)
    parts: list[Part] = [
        Picture(
            "Singular values",
            "Singular values σᵢ of ΔW on a log scale, one panel per kind, one line per module, in the colour of its "
            "block where there are blocks; a line ends where σᵢ is 0 up to rounding.",
            "there is no single level: two factors of pure noise give a nearly flat line, which falls by less than "
            "half from the first direction to the last where r is far below the size of the weight; a steep line shows "
            "structure",
            "Hu et al. 2021, §7.2 (subspaces of different r); the measures as in the glossary",
            _panels("spectra", measured, grids, draw_values),
        ),
        Picture(
            "Energy kept",
            "Share of Σσ² in the k leading directions of every module, one line per kind of module.",
            "r equally strong directions give a straight line, k/r; the farther a curve lies above it, the fewer "
            "directions are enough",
            "Eckart & Young 1936; Hu et al. 2021, §7.2",
            _panels(
                "energy", measured, grids, lambda subject, _: Panel("", [energy_chart(subject.spectra, subject.shares)])
            ),
        ),
        Picture(
            "Effective rank",
            "Effective rank exp(−Σ p ln p), p = σ/Σσ: kinds are rows, blocks are columns.",
            "r where all directions are equally strong; two factors of pure noise give nearly that",
            "Roy & Vetterli 2007",
            _panels("ranks", measured, mapped, draw_ranks),
        ),
        Picture(
            "Energy of each module",
            "The share of ‖ΔW‖² in each module: kinds are rows, blocks are columns. Larger weights can hold more, so "
            "compare modules of one kind.",
            f"{even} if the energy were spread evenly",
            "Hu et al. 2021, §7.1 (which weights to adapt)",
            _panels("shares", measured, mapped, draw_shares),
        ),
    ]
    parts = [part for part in parts if isinstance(part, Picture) and part.panels]
    parts += [part for key in ("kinds", "blocks", "outliers") for part in joined_tables(measured, key)]
    lead = (
        "The singular values σ₁ ≥ σ₂ ≥ … of ΔW = scale·B·A in every module. Energy is a share of Σσ² = ‖ΔW‖²: an "
        "update whose energy lies in few directions can be compressed to a low rank."
    )
    return Section("spectra", "Spectra", lead, parts)


Value = TypeVar("Value")


def _panels(
    key: str, subjects: Sequence[Subject], values: Sequence[Value], draw: Callable[[Subject, Any], Panel]
) -> list[Panel]:
    """The panels of the adapters that have values, each with its key; a single adapter needs no label."""
    return [
        replace(draw(subject, own), key=f"{key}-{i}", label=subject.label if len(subjects) > 1 else "")
        for i, (subject, own) in enumerate(zip(subjects, values, strict=True), start=1)
        if own
    ]


def half_energy_modules(subject: Subject) -> int:
    """The fewest modules that hold half of the energy; ΔW must not be 0."""
    covered = accumulate(sorted(subject.shares.values(), reverse=True), initial=0.0)
    return next(count for count, share in enumerate(covered) if share >= 0.5)


def ranks_section(subjects: Sequence[Subject]) -> Section:
    """Error and size of every rank; an adapter without a plan has the reason instead of a slider."""
    several = len(subjects) > 1
    without = [subject.label for subject in subjects if not subject.on_data]
    parts: list[Part] = []
    # If all of them have activations, or none has, the introduction says so already.
    if 0 < len(without) < len(subjects):
        text = f"No activations were given for {join_words(without)}, so their errors are those of ΔW itself."
        parts.append(Paragraph(text))
    for subject in subjects:
        who = f"{subject.label}: " if several else ""
        best = subject.recommended
        smaller = subject.norm and best and best.uniform.bytes < subject.bytes_before
        if not subject.points:
            parts.append(Paragraph(f"{who}No ranks to choose: {subject.no_plan}."))
        # The first table of the page and the sliders have the recommendations of several adapters. So an adapter gets a
        # sentence only for what these cannot show: why its rank stays, or on how many inputs an error was measured.
        elif not several or subject.on_data or not smaller:
            parts.append(Paragraph(who + advice(subject)))
    for i, subject in enumerate(subjects, start=1):
        share = "output kept" if subject.on_data else "energy kept"
        if subject.points:
            parts.append(Slider(subject.label if several else "", share, slider_data(subject, i)))

    panels = _panels(
        "curve",
        subjects,
        [subject.points for subject in subjects],
        lambda subject, points: Panel("", [curve_chart(points, on_data=subject.on_data, dialect=subject.dialect.name)]),
    )
    plain, output = "‖ΔW−ΔW'‖/‖ΔW‖", "√(E‖(ΔW−ΔW')x‖² / E‖ΔWx‖²) on the inputs given"
    measured = (
        output
        if not without
        else f"{output}, or {plain} without such inputs,"
        if several and len(without) < len(subjects)
        else plain
    )
    if panels:
        picture = Picture(
            "Error against size",
            "Error of the whole update, or of its output where inputs were given, against the size of the file, one "
            "point per rank. The markers show where the slider stands.",
            "r equally strong directions would give √(1 − k/r), which is an error of 71 % at half the size",
            "Eckart & Young 1936",
            panels,
        )
        parts += [picture, *joined_tables(subjects, "ranks")]
    lead = (
        f"The error is {measured} over all modules, before rounding. No other adapter of the same ranks has a smaller "
        "error. Inference servers expect one rank for all modules. A rank for each module gives more directions to the "
        "modules where they reduce the error most."
    )
    return Section("ranks", "Which rank they need" if several else "Which rank it needs", lead, parts)


def quantity(subject: Subject) -> str:
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
            f"of {quantity(subject)} ({_describe_error(subject, below)}), more than the {percent(LOSS)} allowed here."
        )
    # The file of a lower rank need not be smaller, as headers and padding count too.
    if best.uniform.bytes >= subject.bytes_before:
        less = f"makes the file smaller and loses at most {percent(LOSS)} of {quantity(subject)}"
        return f"Keep the adapter as it is: no lower rank for all modules {less}."
    saved = 1 - best.uniform.bytes / subject.bytes_before
    error = _describe_error(subject, best, subject.update_error)
    return (
        f"Rank {best.rank} of {most.rank} for all modules keeps {percent(1 - best.uniform.error**2)} of "
        f"{quantity(subject)} ({error}) in {size(best.uniform.bytes)}, {percent(saved)} less than now."
    )


def _describe_error(subject: Subject, point: CurvePoint, update_error: float | None = None) -> str:
    """The error of a rank and what it was measured on, and the error of ΔW where that is known too."""
    # A few positions cannot stand for all inputs, so the number of them comes before the error.
    positions = f"{count(subject.positions, 'position')}; " if subject.on_data else ""
    of_update = "" if update_error is None else f"; {percent(update_error)} of ΔW itself"
    return f"{positions}error {percent(point.uniform.error)}{of_update}"


def compress_command(subject: Subject) -> str:
    """The command that makes the adapter smaller, without the rank or size, which the slider appends."""
    to = ["--to", subject.dialect.name] if subject.dialect.name != subject.examination.adapter.format else []
    # Without --uniform, compress would choose a rank for each module, which a file of one rank cannot hold.
    uniform = ["--uniform"] if subject.dialect.one_rank else []
    activations = ["--activations", quote_word(subject.activations)] if subject.activations else []
    return subject.examination.command(
        "compress", "-o", subject.examination.sibling("small"), *to, *uniform, *activations
    )


def slider_data(subject: Subject, i: int) -> dict[str, Any]:
    """The data of an adapter's slider on the page: every rank of the curve in words, and its places on the curve."""
    points, best = list(reversed(subject.points)), subject.recommended
    # The axis of the curve is in units that suit its largest file.
    _, step = unit_of(max(point.uniform.bytes for point in points))

    def words(choice: Choice, option: str) -> dict[str, Any]:
        several = "s" if choice.ranks[0] < choice.ranks[1] else ""
        return {
            "option": option,
            "error": percent(choice.error),
            "kept": percent(1 - choice.error**2),
            "bytes": size(choice.bytes),
            "now": percent(choice.bytes / subject.bytes_before),
            "ranks": f"rank{several} {span(choice.ranks)}",
            "at": [choice.bytes / step, 100 * choice.error],
        }

    return {
        "command": compress_command(subject),
        "picture": f"curve-{i}",
        "start": points.index(best) if best else 0,
        "stops": [
            {
                "value": str(point.rank),
                "rank": words(point.uniform, f"--rank {point.rank}"),
                "budget": words(point.budget, f"--parameters {point.uniform.parameters}"),
            }
            for point in points
        ],
    }


# Dtypes of weights that hold an update almost exactly. For a base of such a dtype the page names the command that
# predicts the merge into a narrower dtype.
WIDE = {"float32", "float64"}
# The colours of merge errors reach at least this far: an error that does not matter must not look like a large one. The
# doctor warns from four times this error on.
LEAST_ERROR = 0.05
NEGLIGIBLE = 1e-5  # below this error a sentence says "less than 0.001 %"


def learned_section(subjects: Sequence[Subject]) -> Section:
    """The section of what each adapter learned: its words in sentences, in a picture, and in a table."""
    several = len(subjects) > 1
    parts: list[Part] = []
    for subject in subjects:
        if not subject.learned:
            continue
        # A sentence about strength begins with the name of the adapter, a reason does not.
        who = f"{subject.label}: " if several and not subject.learned.record else ""
        parts += [Paragraph(who + text) for text in subject.learned.paragraphs]
    charts = [subject.learned.chart if subject.learned else None for subject in subjects]
    if any(charts):
        picture = Picture(
            "Words by their change",
            "The words that become more and less likely in neutral texts, with the number of texts in which each did.",
            "under random updates with the same singular values no word changes as much as any that is drawn",
            "the change is that of Minder et al. 2025",
            _panels("words", subjects, charts, lambda _, chart: Panel("", [chart])),
        )
        parts.append(picture)
    for subject in subjects:
        if subject.learned and subject.learned.table and subject.learned.table.rows:
            table = subject.learned.table
            title = f"{table.title}: {subject.label}" if several else table.title
            parts.append(PageTable(replace(table, title=title), folded=True))
    lead = (
        "The base was run on short neutral texts, without the adapter and with it. Words are a hint and no proof: a "
        "word that is missing may have been learned all the same, and nothing here shows what triggers a behaviour."
    )
    explained = any(subject.learned and subject.learned.record for subject in subjects)
    return Section(
        "learned", "What it learned" if not several else "What they learned", lead if explained else "", parts
    )


def base_section(subjects: Sequence[Subject], base: str) -> Section:
    """The section of the base: every adapter against the weights of its base model."""
    measures = [part for measure in (_amplification, _intruders, _merges) for part in measure(subjects)]
    notes = [note for subject in subjects for note in _notes(subject, several=len(subjects) > 1)]
    missing = [] if measures else [Paragraph("No module has a weight in the base.")]
    # Modules that are left out come first, so that no map is read as one of the whole adapter.
    first, last = ([note for note in notes if note.warning is warning] for warning in (True, False))
    lead = (
        f"Each adapter against {base}: whether ΔW amplifies directions that W already uses, whether W + ΔW has leading "
        "directions that W does not have, and how much of ΔW would survive a merge into rounded weights."
    )
    return Section("base", "Against the base", lead, [*first, *measures, *missing, *last])


def _notes(subject: Subject, *, several: bool) -> list[Paragraph]:
    """What is not compared with the base, as warnings, and what was not measured, each with the reason."""
    who = f"{subject.label}: " if several else ""
    notes = []
    if subject.examination.unmatched:
        # The name "" stands for a reason that applies to all modules.
        unmatched = [name for name in subject.examination.unmatched if name]
        modules = f"{len(unmatched)} modules have" if unmatched else "The modules of this adapter have"
        text = f"{modules} no weight in this base and are left out here: see the findings."
        notes.append(Paragraph(who + text, warning=True))
    reordered = sum(reading.module.layout.rows != "" for reading in subject.examination.readings.values())
    if reordered:
        text = f"{reordered} modules have their rows in another order than the base and are left out here"
        notes.append(Paragraph(f"{who}{text}: see the findings.", warning=True))
    if subject.against_base.no_intruders:
        notes.append(Paragraph(f"{who}Intruder dimensions were not looked for: {subject.against_base.no_intruders}."))
    # Modules that use DoRA have no predicted merge: merging them changes W by more than ΔW.
    dora = magnitudes(subject.adapter).keys() & subject.spectra
    if dora:
        share = "of the modules use" if len(dora) < len(subject.spectra) else "modules, which are all of them, use"
        text = f"{len(dora)} {share} DoRA. Run loralens merge --dry-run to measure what a merge makes of them."
        notes.append(Paragraph(who + text))
    return notes


def _amplification(subjects: Sequence[Subject]) -> list[Part]:
    rows = [full_rank_rows(subject.against_base.amplified) for subject in subjects]
    every = [row for own in rows for row in own.values()]
    z, excess = z_scale(every), excess_scale(every)

    def draw(_: Subject, own: Mapping[str, KeptRank]) -> Panel:
        far, expected = count_far(list(own.values()))
        remark = (
            f"{far} of {len(own)} modules are more than {FAR:g} standard deviations from chance; chance alone would "
            f"give {expected:.2g}."
        )
        return Panel("", amplification_maps(own, Grid.of(own), z, excess), remark)

    picture = Picture(
        "What ΔW amplifies",
        "How strong W is along the singular directions U, V of ΔW: ‖UᵀWV‖, compared with random directions.",
        "z = 0 and an excess of 1 for directions that are unrelated to W, whatever ‖ΔW‖/‖UᵀWV‖ is",
        "Hu et al. 2021, §7.3 and Table 7",
        _panels("amplification", subjects, rows, draw),
    )
    return [picture, *joined_tables(subjects, "amplification")] if every else []


def _intruders(subjects: Sequence[Subject]) -> list[Part]:
    found = [subject.against_base.intruders for subject in subjects]
    every = [x for own in found for x in own.values()]
    if not every:
        return []
    # At least to 1, as a scale from 0 to 0 would have no width.
    scale = ColourScale(0, max(1, *(x.count for x in every)), "intruders among the leading directions")

    def draw(subject: Subject, own: Mapping[str, Intruders]) -> Panel:
        def tip(name: str) -> str:
            x = own[name]
            return (
                f"{x.count} of {x.s.size} leading directions of W + ΔW, {percent(x.energy_share)} of their energy; "
                f"lowest score {x.scores.min(initial=1.0):.2f}"
            )

        looked, total = subject.against_base.intruder_counts
        counts = {name: float(x.count) for name, x in own.items()}
        chart = Grid.of(own).heat("", counts, scale, gather=sum, tip=tip)
        return Panel("", [chart], f"{total} of {looked} leading directions are intruders.")

    # The chance depends on the shape of the weight, so kinds may differ in it; all have one threshold.
    low, high = min(x.chance for x in every), max(x.chance for x in every)
    level = percent(low) + (f" to {percent(high)}" if high > low else "")
    picture = Picture(
        "Intruder dimensions",
        f"The number of leading directions of W + ΔW that have no |cosine| of {every[0].threshold:g} or more with any "
        "singular direction of W.",
        f"a random direction counts as an intruder with probability {level}: a low score means that a direction is "
        "spread over many directions of W, not that W lacks it",
        "Shuttleworth et al. 2024, Definition 3.1",
        _panels("intruders", subjects, found, draw),
    )
    # A table of zeros would say nothing that the caption does not.
    return [picture, *(joined_tables(subjects, "intruders") if any(x.count for x in every) else [])]


def _merges(subjects: Sequence[Subject]) -> list[Part]:
    effects = [subject.merge_effects for subject in subjects]
    every = [x for own in effects for x in own.values()]
    if not every:
        return []
    top = max(LEAST_ERROR, *(x.rounding.error for x in every))
    scale = ColourScale(0.0, top, "error of a merge (share of ‖ΔW‖)", percent)

    def draw(subject: Subject, own: Mapping[str, MergeEffect]) -> Panel:
        def tip(name: str) -> str:
            x = own[name]
            return (
                f"error {percent(x.rounding.error)}, {percent(x.rounding.gain)} of its strength survives, "
                f"{percent(x.rounding.unmoved)} of the weights unchanged; ‖ΔW‖/‖W‖ {percent(x.ratio)}"
            )

        # A cell of several modules shows the largest error, as a mean would hide the module that loses its update.
        errors = {name: x.rounding.error for name, x in own.items()}
        remark = f"The largest error, {error_in_words(max(errors.values()))}, is that of {subject.worst_merge}."
        chart = Grid.of(own).heat("", errors, scale, gather=max, tip=tip)
        return Panel("", [chart], remark)

    dtypes = sorted({x.dtype for x in every})
    narrower = " Run loralens doctor --dtype bf16 to see the same for narrower weights." if WIDE & {*dtypes} else ""
    picture = Picture(
        "Merge fidelity, predicted",
        f"The error that a merge into {', '.join(dtypes)} weights would add, as a share of ‖ΔW‖, predicted from at "
        f"most 2¹⁸ entries of each weight.{narrower}",
        "there is no level of chance: 0 % is an exact merge, and an update below half a unit in the last place of W is "
        "lost",
        "W + ΔW is rounded to the nearest value of the dtype of the base, as in loralens merge",
        _panels("merge", subjects, effects, draw),
    )
    return [picture, *joined_tables(subjects, "merges")]


def error_in_words(error: float) -> str:
    """An error within a sentence, where digits in scientific notation are hard to read."""
    return "less than 0.001 %" if error < NEGLIGIBLE else percent(error)
