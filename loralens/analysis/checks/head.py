"""A head that the task needs, and that is in neither the file nor the base."""

from collections.abc import Iterator

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination
from loralens.analysis.clients.peft import has_head, lost_heads

CODES = {
    "head-missing": "The task or the class needs a head that a pretrained base does not have, and the file does not "
    "have it either. PEFT refuses to load such a file, or predicts with a head of random numbers.",
}


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report what PEFT misses: an error if it refuses the file, or if it is known that the base has no head."""
    for finding in lost_heads(exam.adapter):
        if finding.level == "error" or not exam.base_tensors:
            yield Diagnosis(finding.level, finding.code, finding.text, finding.fix)
        elif not has_head(exam.base_tensors):
            yield Diagnosis("error", finding.code, f"{finding.text}; this base has none", finding.fix)
