"""Modules that find no weight in the base, or one of another shape."""

from collections.abc import Iterator

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.patient import Patient

RULES = {
    "base-mismatch": "The base has no weight of this name and shape. Servers skip such modules without a word: the "
    "adapter then does less than it should, or nothing."
}


def look(patient: Patient) -> Iterator[Diagnosis]:
    """One diagnosis for every module without a weight; one for the adapter where none has one."""
    reason = patient.strays.get("")
    if reason:
        yield Diagnosis("error", "base-mismatch", f"this is not its base: {reason[0]}", reason[1])
        return
    for name, (what, fix) in patient.strays.items():
        yield Diagnosis("error", "base-mismatch", what, fix, name)
