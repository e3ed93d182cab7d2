"""Modules for which the base has no weight, or one of another shape."""

from collections.abc import Iterator

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination

RULES = {
    "base-mismatch": "The base has no weight of this name and shape. Servers skip such modules without a word: the "
    "adapter then does less than it should, or nothing."
}


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report every module without a weight; only the adapter if no module has one."""
    reason = exam.unmatched.get("")
    if reason:
        yield Diagnosis("error", "base-mismatch", f"this is not its base: {reason[0]}", reason[1])
        return
    for name, (what, fix) in exam.unmatched.items():
        yield Diagnosis("error", "base-mismatch", what, fix, name)
