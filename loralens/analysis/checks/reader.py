"""The findings of the reader, reported with those of the checks."""

from collections.abc import Iterator

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination

CODES: dict[str, str] = {}  # readers have codes of their own, whose texts explain themselves


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report the findings of the reader; a text that begins with the name of a module belongs to that module."""
    for finding in exam.adapter.findings:
        name, _, text = finding.text.partition(": ")
        about_module = text and name in exam.adapter
        evidence, module = (text, name) if about_module else (finding.text, None)
        yield Diagnosis(finding.level, finding.code, evidence, finding.fix, module)
