"""What was measured on texts, on the page: the first sentence and the first section."""

import pytest

from loralens.formats.records.results import MeasuredAdapter, StoredEvaluation
from loralens.reporting.report_files import report_html
from loralens.reporting.sentences import name_on_page, quality_sentence
from loralens.verbs.pages.page import quality_table_of
from tests.reporting.adapters import drawn, measured, report

STORED = StoredEvaluation(
    "base",
    "classification",
    "news held out",
    160,
    [
        MeasuredAdapter("runs/a", 1234567, {"loss": 0.1494, "accuracy": 0.95625}),
        MeasuredAdapter("far/away/small<b>", None, {"loss": None, "accuracy": 0.9}),
    ],
)


def test_the_page_begins_with_it() -> None:
    subjects = measured({"runs/a": drawn(1)})
    made = report(subjects, [], evaluations=[quality_table_of(STORED, subjects)])
    assert [section.key for section in made.sections][:2] == ["quality", "findings"]
    assert made.summary[0] == (
        "On 160 texts of news held out: accuracy 95.6 % with runs/a (1,234,567 parameters) and 90 % with small<b>."
    )
    html = report_html(made)
    assert "<td>0.1494</td>" in html or ">0.1494<" in html
    assert "1,234,567" in html
    assert "small&lt;b&gt;" in html
    assert "small<b>" not in html


@pytest.mark.parametrize(
    ("task", "measures", "text"),
    [
        ("causal-lm", {"loss": 2.0, "accuracy": 0.5, "perplexity": 7.389}, "perplexity 7.389 with the model alone."),
        ("masked-lm", {"loss": 2.0, "accuracy": 0.5}, "loss 2 with the model alone."),
        ("classification", {"loss": 2.0}, "loss 2 with the model alone."),
        ("a later one", {"bleu": 2.0}, "1 adapter measured on 1 text of t."),
    ],
)
def test_the_measure_that_says_most(task: str, measures: dict[str, float], text: str) -> None:
    row = name_on_page(MeasuredAdapter(None, None, measures), [])
    sentence = quality_sentence(StoredEvaluation("m", task, "t", 1, [row]))
    assert sentence.endswith(text)
