"""What the reader of the file had to say."""

from collections.abc import Iterator

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.patient import Patient

RULES: dict[str, str] = {}  # the readers' codes are their own, and say themselves what they mean


def look(patient: Patient) -> Iterator[Diagnosis]:
    """The findings of the adapter; those that begin with the name of a module are that module's."""
    for finding in patient.adapter.findings:
        name, _, text = finding.text.partition(": ")
        if text and name in patient.adapter:
            yield Diagnosis(finding.level, finding.code, text, finding.fix, name)
        else:
            yield Diagnosis(finding.level, finding.code, finding.text, finding.fix)
