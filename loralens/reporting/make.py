"""Assembles a report from measurements: its sections, in the order in which they are read."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralens.analysis.diagnosis import Diagnosis
from loralens.formats.records.results import StoredEvaluation
from loralens.reporting.base import base_section
from loralens.reporting.collection import CheckpointRun, Collection
from loralens.reporting.comparison import comparison_section
from loralens.reporting.document import Report
from loralens.reporting.overview import facts_section, findings_section, modules_section
from loralens.reporting.quality import quality_section, quality_sentences
from loralens.reporting.ranks import ranks_section, slider_data
from loralens.reporting.record import DeferredRecord, report_record
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.run import run_section
from loralens.reporting.spectra import spectra_section
from loralens.reporting.subject import Subject
from loralens.reporting.summary import remarks, summary_sentences
from loralens.reporting.verdicts import headline, verdict_of, verdict_record, verdicts_table
from loralens.tables.numbers import count, join_words


def make_report(
    subjects: Sequence[Subject],
    findings: Sequence[Diagnosis],
    *,
    tables: ResultTables,
    collection: Collection | None = None,
    run: CheckpointRun | None = None,
    base: str | None = None,
    evaluations: Sequence[StoredEvaluation] = (),
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
    collection : Collection, optional
        The comparison of two or more adapters; None if no two of them have a module in common.
    run : CheckpointRun, optional
        Given if the adapters are checkpoints of one run.
    base : str, optional
        The name of the base.
    evaluations : sequence of StoredEvaluation
        What was measured on texts, of these adapters or of others.
    command : str
        The command that makes the report, which the page shows at its top.
    choices : mapping, optional
        Further options of the user, which the JSON repeats.
    """
    # A module has the same number in all adapters, so that the filter of the page selects it in all of them.
    names = list(dict.fromkeys(name for subject in subjects for name in subject.examination.readings))
    numbers = {name: i for i, name in enumerate(names)}
    # Whether the task is still solved is what readers want to know first.
    quality = quality_sentences(evaluations, subjects)
    sentences = [*quality, *summary_sentences(subjects, findings, collection, run)]
    verdicts = [verdict_of(subject, findings) for subject in subjects]
    answer, *further_answers = [*quality, headline(subjects, verdicts, collection, run)]
    sections = [
        # What was measured on texts is what readers want to know first. The findings and the facts follow, as all
        # numbers below depend on them. The longest table comes last.
        *([quality_section(evaluations, subjects, tables)] if evaluations else []),
        findings_section(subjects, findings, base),
        facts_section(subjects),
        *([run_section(subjects, run, tables)] if run else []),
        spectra_section(subjects, numbers, tables),
        ranks_section(subjects, tables),
        *([base_section(subjects, numbers, base, tables)] if base else []),
        # Several adapters get this section even if they have nothing in common, which it then says.
        *([comparison_section(subjects, collection, numbers, tables)] if len(subjects) > 1 else []),
        modules_section(subjects, numbers, tables),
    ]
    labels = [subject.label for subject in subjects]
    choices = {"base": base, "command": command, **(choices or {})}
    first_screen = {"headline": answer, "verdicts": list(map(verdict_record, verdicts))}
    return Report(
        # Four names and more would not fit on the tab of a browser.
        title=join_words(labels) if len(labels) < 4 else f"{labels[0]} and {count(len(labels) - 1, 'other adapter')}",
        command=command,
        summary=sentences,
        headline=answer,
        verdicts=verdicts_table(verdicts),
        remarks=[*further_answers, *remarks(subjects)],
        sections=sections,
        modules=names,
        sliders=[slider_data(subject, i) for i, subject in enumerate(subjects) if subject.plan is not None],
        record=DeferredRecord(
            lambda: report_record(subjects, findings, collection, run, sentences, tables, choices | first_screen)
        ),
    )
