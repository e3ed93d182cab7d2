"""The sections without charts: what the doctor found, what each adapter is, and the table of all modules."""

from collections import Counter
from collections.abc import Mapping, Sequence

from loralens.analysis.checks.diagnosis import LEVELS, Diagnosis, by_cause
from loralens.charts.names import fit_name
from loralens.core.carried import NORMS
from loralens.core.names import kind, some
from loralens.core.naming.base_model import group_models
from loralens.reporting.document import Notice, Notices, PageTable, Paragraph, Part, Section
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import Subject
from loralens.tables.numbers import count, join_words, number, size, span
from loralens.tables.table import Column, Table

# Modules whose evidence is spelled out in a finding; the others are counted, as they repeat it with other numbers.
SHOWN = 3
KINDS = 8  # kinds of modules that are listed by name: those of most modules
LONG = 160  # letters of the name of a base model, which may be a long path
OPEN = 60  # modules up to which their table stands open


def findings_section(subjects: Sequence[Subject], findings: Sequence[Diagnosis], base: str | None) -> Section:
    """The section of the doctor's findings, most serious first; modules with the same finding share one notice."""
    labels = {subject.path: subject.label for subject in subjects}
    notices = [_notice(same, labels, subjects) for same in by_cause(findings)]
    levels = Counter(notice.level for notice in notices)
    counts = ", ".join(count(levels[level], level) for level in LEVELS if levels[level])
    against = f", checked against {base}" if base else ""
    meaning = (
        " An error means that the adapter does not work as it is, a warning that it may not do what was intended."
        if counts
        else ""
    )
    lead = f"{counts}{against}.{meaning}" if counts else f"Checked against {base}." if base else ""
    good = "The doctor found nothing to report: no dead, damaged, wrongly scaled or over-ranked module."
    sick = [f"{subject.label}: {some(list(subject.sick))}" for subject in subjects if subject.sick]
    parts: list[Part] = [Notices(notices, good)]
    if sick:
        parts.append(
            Paragraph(f"Left out of everything below because they hold NaN or Inf: {'; '.join(sick)}.", warning=True)
        )
    return Section("findings", "Findings", lead, parts)


def _notice(same: Sequence[Diagnosis], labels: Mapping[str, str], subjects: Sequence[Subject]) -> Notice:
    first = same[0]
    whose = (
        list(dict.fromkeys(labels.get(finding.adapter, finding.adapter) for finding in same))
        if len(subjects) > 1
        else []
    )
    label = "" if not whose else f"all {len(subjects)} adapters" if len(whose) == len(subjects) else some(whose, 4)
    modules = [finding.module for finding in same if finding.module]
    of = next((len(subject.patient.readings) for subject in subjects if subject.path == first.adapter), 0)
    place = modules[0] if len(modules) == 1 else f"{len(modules)} of {of} modules" if modules else ""
    kinds = {kind(name) for name in modules}
    if len(modules) > 1 and len(kinds) == 1:
        place += f", all {fit_name(kinds.pop(), 40)}"
    texts = list(
        dict.fromkeys(
            f"{finding.module}: {finding.evidence}" if len(modules) > 1 and finding.module else finding.evidence
            for finding in same
        )
    )
    evidence = texts[:SHOWN]
    if len(texts) > SHOWN:
        evidence.append(f"and {len(texts) - SHOWN} more like these")
    return Notice(first.level, first.code, " · ".join(filter(None, (label, place))), evidence, first.fix)


def facts_section(subjects: Sequence[Subject]) -> Section:
    """The section that says what each adapter is: one fact per row, one adapter per column."""
    facts = [_facts(subject) for subject in subjects]
    names = list(dict.fromkeys(name for own in facts for name in own))
    columns: list[Column[str]] = [Column("fact", lambda name: name, " ", align="left")]
    columns += [_facts_column(subject.label, own) for subject, own in zip(subjects, facts, strict=True)]
    parts: list[Part] = [PageTable(Table("", columns, names)), *_bases(subjects)]
    return Section("identity", "What it is" if len(subjects) == 1 else "What they are", "", parts)


def _bases(subjects: Sequence[Subject]) -> list[Part]:
    """A warning where the adapters name different base models."""
    models = [subject.patient.named for subject in subjects]
    groups = group_models(models)
    if len(groups) < 2:
        return []
    models_by_adapter = "; ".join(
        f"{join_words([subjects[i].label for i in group])}: {fit_name(models[group[0]].name, LONG)}" for group in groups
    )
    consequence = "Updates of different bases cannot be compared; the comparisons below assume one base for all."
    return [Paragraph(f"The adapters name different base models ({models_by_adapter}). {consequence}", warning=True)]


def _facts_column(label: str, facts: Mapping[str, str]) -> Column[str]:
    # A function of its own, as a lambda in a loop would show the facts of the last adapter in every column.
    return Column(label, lambda name: facts.get(name, ""), label or " ", align="left")


def _facts(subject: Subject) -> dict[str, str]:
    adapter, modules = subject.patient.adapter, [reading.module for reading in subject.patient.readings.values()]
    scales = Counter((module.scale, str(module.scaling)) for module in modules)
    kinds = Counter(kind(name) for name in subject.patient.readings)
    extra = Counter(extra.role for extra in adapter.extra.values() if extra.role not in NORMS)
    extra_bytes = sum(extra.tensor.nbytes for extra in adapter.extra.values())
    facts = {
        "file": subject.path,
        "format": adapter.format,
        "base model": fit_name(adapter.base_model or "not named", LONG),
        "modules": count(len(modules), "module")
        + (f" of {len(adapter)}" if len(modules) < len(adapter) else "")
        + (f", {len(subject.sick)} left out" if subject.sick else ""),
        "kinds": ", ".join(f"{fit_name(name, 40)} ({times})" for name, times in kinds.most_common(KINDS))
        + (f" and {len(kinds) - KINDS} more" if len(kinds) > KINDS else ""),
        "rank r": span([module.rank for module in modules]),
        "scale": "; ".join(f"{number(scale)} ({source})" for (scale, source), _ in scales.most_common(2))
        + (f" and {len(scales) - 2} more" if len(scales) > 2 else ""),
        "dtype": ", ".join(sorted({str(module.dtype) for module in modules})),
        "parameters": f"{adapter.parameters:,} in pairs",
        "size": size(adapter.nbytes),
        "‖ΔW‖": number(subject.norm if subject.spectra else None),
    }
    if extra:
        roles = ", ".join(f"{times} {role}" for role, times in extra.items())
        facts["other tensors"] = f"{roles} tensors, {size(extra_bytes)}; they are not measured here"
    return facts


def modules_section(subjects: Sequence[Subject], numbers: Mapping[str, int], tables: ResultTables) -> Section:
    """The section of all modules: one table per adapter."""
    parts = [
        PageTable(tables.modules(one), [[numbers[name]] for name in one.spectra], folded=len(one.spectra) > OPEN)
        for one in subjects
    ]
    return Section(
        "modules",
        "Every module",
        "Click a column heading to sort. The filter at the top of the page selects modules.",
        parts,
    )
