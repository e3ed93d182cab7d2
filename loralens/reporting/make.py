"""Assembles a report from measurements: its sections, in the order in which they are read."""

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
        One or more, with labels that differ.
    findings : sequence of Diagnosis
        The findings of all adapters, most serious first.
    tables : ResultTables
        Functions that make tables of the measurements.
    company : Company, optional
        The comparison of two or more adapters; None where no two have a module in common.
    course : Course, optional
        Given where the adapters are checkpoints of one run.
    base : str, optional
        The name of the base.
    command : str
        The command that makes the report, which the page shows at its top.
    choices : mapping, optional
        Further options of the user, which the JSON repeats.
    """
    names = list(dict.fromkeys(name for subject in subjects for name in subject.patient.readings))
    numbers = {name: i for i, name in enumerate(names)}
    sentences = summary.sentences(subjects, findings, company, course)
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
        title=_title([subject.label for subject in subjects]),
        command=command,
        summary=sentences,
        sections=sections,
        modules=names,
        carried=[
            ranks.slider(subject, i)
            for i, subject in enumerate(subjects)
            if subject.plan is not None and subject.points
        ],
        record=record(
            subjects,
            findings,
            company,
            course,
            sentences,
            tables,
            {"base": base, "command": command, **(choices or {})},
        ),
    )


def _title(labels: Sequence[str]) -> str:
    return listed(labels) if len(labels) < 4 else f"{labels[0]} and {count(len(labels) - 1, 'other adapter')}"
