"""From what was measured to the report: its sections in the order in which they are read."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.reporting import base as beside_base
from loralens.reporting import identity, modules, ranks, run, spectra, summary, together
from loralens.reporting.company import Company, Course
from loralens.reporting.document import Report
from loralens.reporting.record import record
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import Subject
from loralens.tables.numbers import count, listed


def make_report(
    subjects: Sequence[Subject],
    findings: Sequence[Diagnosis],
    *,
    tables: ResultTables,
    company: Company | None = None,
    course: Course | None = None,
    base: str | None = None,
    command: str = "",
    choices: Mapping[str, Any] | None = None,
) -> Report:
    """The report of one adapter or several.

    Parameters
    ----------
    subjects : sequence of Subject
        One or more, each label different.
    findings : sequence of Diagnosis
        Of all of them, most serious first.
    tables : ResultTables
        How what was measured becomes tables.
    company : Company, optional
        Of two or more; None where none have anything in common.
    course : Course, optional
        Where they are checkpoints of one run.
    base : str, optional
        What the base is called.
    command : str
        That makes the report, shown on top.
    choices : mapping, optional
        What else was asked for, for the record.
    """
    names = list(dict.fromkeys(name for one in subjects for name in one.patient.readings))
    numbers = {name: i for i, name in enumerate(names)}
    said = summary.sentences(subjects, findings, company, course)
    sections = [
        identity.health(subjects, findings, base),
        identity.identity(subjects),
        *([run.section(subjects, course, tables)] if course else []),
        spectra.section(subjects, numbers, tables),
        ranks.section(subjects, tables),
        *([beside_base.section(subjects, numbers, base, tables)] if base else []),
        *([together.section(subjects, company, numbers, tables)] if len(subjects) > 1 else []),
        modules.section(subjects, numbers, tables),
    ]
    return Report(
        title=_title([one.label for one in subjects]),
        command=command,
        summary=said,
        sections=sections,
        modules=names,
        carried=[ranks.slider(one, i) for i, one in enumerate(subjects) if one.plan is not None and one.points],
        record=record(
            subjects, findings, company, course, said, tables, {"base": base, "command": command, **(choices or {})}
        ),
    )


def _title(labels: Sequence[str]) -> str:
    return listed(labels) if len(labels) < 4 else f"{labels[0]} and {count(len(labels) - 1, 'other adapter')}"
