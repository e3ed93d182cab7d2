"""The sections without charts: what the doctor found, what each adapter is, and the table of all modules."""

from collections import Counter
from collections.abc import Mapping, Sequence

from loralens.analysis.diagnosis import LEVELS, Diagnosis, by_cause
from loralens.analysis.spectrum import mean_effective_rank
from loralens.charts.grid import fit_name
from loralens.core.base_model import group_models
from loralens.core.names import kind, some
from loralens.core.together import NORMS
from loralens.reporting.document import Notice, Notices, PageTable, Paragraph, Part, Section
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.spectra import half_energy_modules
from loralens.reporting.subject import Subject
from loralens.tables.numbers import count, join_words, number, size, span
from loralens.tables.table import Column, Table

# The number of modules whose evidence a finding shows. The others are counted, because their evidence differs in its
# numbers only. `loralens doctor` shows the evidence of the same number of modules.
SHOWN = 3
KINDS = 8  # kinds of modules that are listed by name, those with the most modules: a decoder block has seven
LONG = 160  # letters of the name of a base model, which may be a long path
KIND = 40  # letters of a kind within a sentence: that of a module outside blocks may be its whole name
OPEN = 60  # with at most this many modules their table is open at first


def findings_section(subjects: Sequence[Subject], findings: Sequence[Diagnosis], base: str | None) -> Section:
    """The section of the doctor's findings, most serious first; modules with the same finding share one notice."""
    labels = {subject.path: subject.label for subject in subjects}
    notices = [_notice(same, labels, subjects) for same in by_cause(findings)]
    levels = Counter(notice.level for notice in notices)
    counts = ", ".join(count(levels[level], level) for level in LEVELS if levels[level])
    against = f", checked against {base}" if base else ""
    meaning = "An error means that the adapter does not work as it is, a warning that it may not do what was intended."
    lead = f"{counts}{against}. {meaning}" if counts else f"Checked against {base}." if base else ""
    good = "The doctor found nothing to report: no dead, damaged, wrongly scaled or over-ranked module."
    parts: list[Part] = [Notices(_by_code(notices) if len(subjects) > 1 else notices, good)]
    # Said here and not in every section, as the error of the doctor on these modules stands just above.
    non_finite = [f"{subject.label}: {some(list(subject.non_finite))}" for subject in subjects if subject.non_finite]
    if non_finite:
        text = f"Left out of everything below because they hold NaN or Inf: {'; '.join(non_finite)}."
        parts.append(Paragraph(text, warning=True))
    return Section("findings", "Findings", lead, parts)


def _by_code(notices: Sequence[Notice]) -> list[Notice]:
    """Join the notices of several adapters that have the same level and code.

    A joined notice stands at the place of the first of its notices.
    """
    groups: dict[tuple[str, str], list[Notice]] = {}
    for notice in notices:
        groups.setdefault((notice.level, notice.code), []).append(notice)
    return [
        same[0] if len(same) == 1 else Notice(same[0].level, same[0].code, "", (), each=same)
        for same in groups.values()
    ]


def _notice(same: Sequence[Diagnosis], labels: Mapping[str, str], subjects: Sequence[Subject]) -> Notice:
    first, label = same[0], ""
    # A single adapter needs no name.
    if len(subjects) > 1:
        adapters = list(dict.fromkeys(labels.get(finding.adapter, finding.adapter) for finding in same))
        label = f"all {len(subjects)} adapters" if len(adapters) == len(subjects) else some(adapters, 4)
    modules = [finding.module for finding in same if finding.module]
    total = next((len(subject.examination.readings) for subject in subjects if subject.path == first.adapter), 0)
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
    parts: list[Part] = [PageTable(Table("", columns, names)), *_bases(subjects)]
    return Section("identity", "What it is" if len(subjects) == 1 else "What they are", "", parts)


def _bases(subjects: Sequence[Subject]) -> list[Part]:
    """A warning where the adapters name different base models."""
    models = [subject.examination.named for subject in subjects]
    groups = group_models(models)
    if len(groups) < 2:
        return []
    models_by_adapter = "; ".join(
        f"{join_words([subjects[i].label for i in group])}: {fit_name(models[group[0]].name, LONG)}" for group in groups
    )
    consequence = "Updates of different bases cannot be compared; the comparisons below assume one base for all."
    return [Paragraph(f"The adapters name different base models ({models_by_adapter}). {consequence}", warning=True)]


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


def modules_section(subjects: Sequence[Subject], numbers: Mapping[str, int], tables: ResultTables) -> Section:
    """The section of all modules: one table per adapter."""
    parts = [
        PageTable(tables.modules(x), [[numbers[name]] for name in x.spectra], folded=len(x.spectra) > OPEN)
        for x in subjects
    ]
    lead = "Click a column heading to sort. The filter at the top of the page selects modules."
    return Section("modules", "Every module", lead, parts)
