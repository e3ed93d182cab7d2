"""The first two sections: what the doctor found, and what the adapters are."""

from collections import Counter
from collections.abc import Mapping, Sequence

from loralens.analysis.checks.diagnosis import LEVELS, Diagnosis, by_cause
from loralens.charts.names import fit
from loralens.core.carried import NORMS
from loralens.core.names import kind, some
from loralens.core.naming.base_model import group_models
from loralens.reporting.document import Notice, Notices, PageTable, Part, Section, Text
from loralens.reporting.subject import Subject
from loralens.tables.numbers import count, listed, number, size, span
from loralens.tables.table import Column, Table

SHOWN = 3  # modules whose evidence stands in the text
LONG = 160  # letters of a base model's name


def health(subjects: Sequence[Subject], findings: Sequence[Diagnosis], base: str | None) -> Section:
    """What the doctor found, most serious first, modules with the same finding together."""
    labels = {one.path: one.label for one in subjects}
    notices = [_notice(same, labels, subjects) for same in by_cause(findings)]
    levels = Counter(one.level for one in notices)
    said = ", ".join(count(levels[level], level) for level in LEVELS if levels[level])
    against = f", each held against {base}" if base else ""
    meaning = " Errors do not work as they are, warnings may not do what was meant." if said else ""
    lead = f"{said}{against}.{meaning}" if said else f"Each held against {base}." if base else ""
    good = "The doctor found nothing to say: no dead, damaged, wrongly scaled or over-ranked module."
    sick = [f"{one.label}: {some(list(one.sick))}" for one in subjects if one.sick]
    parts: list[Part] = [Notices(notices, good)]
    if sick:
        parts.append(Text(f"Left out of everything below, as they hold NaN or Inf: {'; '.join(sick)}.", warning=True))
    return Section("findings", "Findings", lead, parts)


def _notice(same: Sequence[Diagnosis], labels: Mapping[str, str], subjects: Sequence[Subject]) -> Notice:
    first = same[0]
    whose = list(dict.fromkeys(labels.get(one.adapter, one.adapter) for one in same)) if len(subjects) > 1 else []
    label = "" if not whose else f"all {len(subjects)} adapters" if len(whose) == len(subjects) else some(whose, 4)
    modules = [one.module for one in same if one.module]
    of = next((len(one.patient.readings) for one in subjects if one.path == first.adapter), 0)
    where = modules[0] if len(modules) == 1 else f"{len(modules)} of {of} modules" if modules else ""
    kinds = {kind(name) for name in modules}
    if len(modules) > 1 and len(kinds) == 1:
        where += f", all {fit(kinds.pop(), 40)}"
    texts = list(
        dict.fromkeys(
            f"{one.module}: {one.evidence}" if len(modules) > 1 and one.module else one.evidence for one in same
        )
    )
    evidence = texts[:SHOWN]
    if len(texts) > SHOWN:
        evidence.append(f"and {len(texts) - SHOWN} more like these")
    return Notice(first.level, first.code, " · ".join(filter(None, (label, where))), evidence, first.fix)


def identity(subjects: Sequence[Subject]) -> Section:
    """What each adapter is: a fact a row, an adapter a column."""
    facts = [_facts(one) for one in subjects]
    names = list(dict.fromkeys(name for one in facts for name in one))
    columns: list[Column[str]] = [Column("fact", lambda name: name, " ", align="left")]
    columns += [_facts_column(one.label, own) for one, own in zip(subjects, facts, strict=True)]
    parts: list[Part] = [PageTable(Table("", columns, names)), *_bases(subjects)]
    return Section("identity", "What it is" if len(subjects) == 1 else "What they are", "", parts)


def _bases(subjects: Sequence[Subject]) -> list[Part]:
    """That they name different base models, where they do."""
    models = [one.patient.named for one in subjects]
    groups = group_models(models)
    if len(groups) < 2:
        return []
    said = "; ".join(
        f"{listed([subjects[i].label for i in group])}: {fit(models[group[0]].name, LONG)}" for group in groups
    )
    told = "An update means something only beside its own base: what is compared below takes them for one base."
    return [Text(f"They name different base models ({said}). {told}", warning=True)]


def _facts_column(label: str, facts: Mapping[str, str]) -> Column[str]:
    return Column(label, lambda name: facts.get(name, ""), label or " ", align="left")


def _facts(one: Subject) -> dict[str, str]:
    adapter, modules = one.patient.adapter, [reading.module for reading in one.patient.readings.values()]
    scales = Counter((module.scale, str(module.scaling)) for module in modules)
    kinds = Counter(kind(name) for name in one.patient.readings)
    extra = Counter(extra.role for extra in adapter.extra.values() if extra.role not in NORMS)
    beside = sum(extra.tensor.nbytes for extra in adapter.extra.values())
    facts = {
        "file": one.path,
        "format": adapter.format,
        "base model": fit(adapter.base_model or "not said", LONG),
        "modules": count(len(modules), "module")
        + (f" of {len(adapter)}" if len(modules) < len(adapter) else "")
        + (f", {len(one.sick)} left out" if one.sick else ""),
        "kinds": ", ".join(f"{fit(name, 40)} ({times})" for name, times in kinds.most_common(8))
        + (f" and {len(kinds) - 8} more" if len(kinds) > 8 else ""),
        "rank r": span([module.rank for module in modules]),
        "scale": "; ".join(f"{number(scale)} ({source})" for (scale, source), _ in scales.most_common(2))
        + (f" and {len(scales) - 2} more" if len(scales) > 2 else ""),
        "dtype": ", ".join(sorted({str(module.dtype) for module in modules})),
        "parameters": f"{adapter.parameters:,} in pairs",
        "size": size(adapter.nbytes),
        "‖ΔW‖": number(one.norm if one.spectra else None),
    }
    if extra:
        roles = ", ".join(f"{times} {role}" for role, times in extra.items())
        facts["besides"] = f"{roles} tensors, {size(beside)}; not part of what is measured here"
    return facts
