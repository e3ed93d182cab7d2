"""Modules for which the base has no weight, or one of another shape."""

from collections.abc import Iterator

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination

CODES = {
    "base-mismatch": "The base has no weight of this name and shape. Servers skip such modules without a message, so "
    "that the adapter does less than it should, or nothing."
}


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report every module without a weight; only the adapter if no module has one."""
    # One error about the adapter says more than the same one for each of hundreds of modules.
    if reason := exam.unmatched.get(""):
        yield Diagnosis("error", "base-mismatch", f"this is not its base: {reason[0]}", reason[1])
        return
    for name, (what, fix) in exam.unmatched.items():
        yield Diagnosis("error", "base-mismatch", what, fix, name)
