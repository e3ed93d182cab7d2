"""The section of a report that shows what was measured on texts: accuracy, loss or perplexity with each adapter."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePath

from loralens.formats.records.results import MeasuredAdapter, StoredEvaluation
from loralens.reporting.document import PageTable, Section
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import Subject
from loralens.tables.numbers import count, join_words, number, percent

# A sentence names the first of these measures that was measured. People know accuracy best.
HEADLINE = {"classification": ("accuracy", "loss"), "causal-lm": ("perplexity", "loss")}
NAMED = 4  # adapters that a sentence names; the table has all of them
BARE_MODEL = "the model alone"


def quality_section(
    evaluations: Sequence[StoredEvaluation], subjects: Sequence[Subject], tables: ResultTables
) -> Section:
    """The section with one table for each evaluation."""
    named = [_with_labels(evaluation, subjects) for evaluation in evaluations]
    lead = (
        "The model was run on texts with each adapter. The results show how well it does the task; the sections below "
        "describe the adapters themselves."
    )
    return Section("quality", "Quality on texts", lead, [PageTable(tables.quality(evaluation)) for evaluation in named])


def quality_sentences(evaluations: Sequence[StoredEvaluation], subjects: Sequence[Subject]) -> list[str]:
    """One sentence for each evaluation: the best-known measure, and its values with at most `NAMED` adapters."""
    return [_sentence(_with_labels(evaluation, subjects)) for evaluation in evaluations]


def _sentence(evaluation: StoredEvaluation) -> str:
    measures = HEADLINE.get(evaluation.task, ("loss",))
    measured = set(evaluation.adapters[0].measures)
    measure = next((name for name in measures if name in measured), "")
    texts = f"{count(evaluation.texts, 'text')} of {evaluation.data}"
    if not measure:
        return f"{count(len(evaluation.adapters), 'adapter')} measured on {texts}."
    values = [_value(row, measure) for row in evaluation.adapters[:NAMED]]
    unnamed = len(evaluation.adapters) - NAMED
    if unnamed > 0:
        values.append(f"{unnamed} more below")
    return f"On {texts}: {measure} {join_words(values)}."


def _value(row: MeasuredAdapter, measure: str) -> str:
    value = row.measures.get(measure)
    text = percent(value) if measure == "accuracy" else number(value)
    size = f" ({row.parameters:,} parameters)" if row.parameters is not None else ""
    return f"{text} with {row.path}{size}"


def _with_labels(evaluation: StoredEvaluation, subjects: Sequence[Subject]) -> StoredEvaluation:
    """The same evaluation, in which every path is replaced by the name that the adapter has on the page."""
    labels = {subject.path: subject.label for subject in subjects}
    # An adapter that is not on the page is named by the end of its path.
    named = [
        row._replace(path=BARE_MODEL if row.path is None else labels.get(row.path) or PurePath(row.path).name)
        for row in evaluation.adapters
    ]
    return replace(evaluation, adapters=named)
