"""What the reader of the file had to say."""

from collections.abc import Iterator

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.patient import Patient

RULES: dict[str, str] = {}  # the readers' codes are their own, and say themselves what they mean


def look(patient: Patient) -> Iterator[Diagnosis]:
    """The findings of the adapter, as they are."""
    for finding in patient.adapter.findings:
        yield Diagnosis(finding.level, finding.code, finding.text, finding.fix)
