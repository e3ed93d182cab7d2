"""Modules that do nothing, because a factor is zero."""

from collections.abc import Iterator

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.patient import Patient, Reading

RULES = {
    "zero-update": "B or A is all zero, so the module adds nothing: it was never trained, or was trained and not saved."
}


def look(patient: Patient) -> Iterator[Diagnosis]:
    """One diagnosis for every module whose ΔW is 0 although its scale is not."""
    drop = patient.compress("trained", "--energy 1 --drop-dead")
    fix = f"never trained: check the training code's target modules; or leave them out: `{drop}`"
    for name, reading in patient.readings.items():
        if reading.spectrum is not None and reading.spectrum.spectral == 0 and reading.module.scale != 0:
            yield Diagnosis("warning", "zero-update", _reason(reading), fix, name)


def _reason(reading: Reading) -> str:
    zero = [name for name, factor in (("B", reading.B), ("A", reading.A)) if factor and not factor.lengths.any()]
    if zero:
        return "B and A are all zero" if len(zero) == 2 else f"{zero[0]} is all zero"
    return "B·A is zero" if reading.A else "ΔW is zero"
