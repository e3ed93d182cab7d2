"""Modules that do nothing because a factor, or the product of the factors, is zero."""

from collections.abc import Iterator
from math import log2
from sys import float_info

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination
from loralens.analysis.readings.module import ModuleReading

CODES = {
    "zero-update": "B or A is all zero, so the module adds nothing: it was never trained, or was trained and not "
    "saved. Or both are so small that their product is lost."
}

TOO_SMALL = "multiply B by a power of 2 until float64 can hold the product, and save it; a merge adds nothing as it is"


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report every module whose ΔW is 0 although its scale is not."""
    drop = exam.compress("trained", "--energy 1 --drop-dead")
    untrained = f"never trained: check the training code's target modules; or leave them out: `{drop}`"
    for name, reading in exam.readings.items():
        # A scale of 0 has a finding of its own, whatever the factors are.
        if reading.spectrum is not None and reading.spectrum.spectral == 0 and reading.module.scale != 0:
            fix = TOO_SMALL if _underflows(reading) else untrained
            yield Diagnosis("warning", "zero-update", _reason(reading), fix, name)


def _reason(reading: ModuleReading) -> str:
    zero = [name for name, factor in (("B", reading.B), ("A", reading.A)) if factor and not factor.lengths.any()]
    if zero:
        return "B and A are all zero" if len(zero) == 2 else f"{zero[0]} is all zero"
    if _underflows(reading) and reading.B and reading.A:
        sizes = f"largest entries {reading.B.largest:.2g} and {reading.A.largest:.2g}"
        return f"scale·B·A is smaller than float64 can hold ({sizes})"
    return "B·A is zero" if reading.A else "ΔW is zero"


def _underflows(reading: ModuleReading) -> bool:
    """Whether the product is 0 only because it is too small for float64, with no factor 0."""
    if not (reading.B and reading.A and reading.B.largest and reading.A.largest):
        return False
    # In logarithms, because the product of the largest entries is what underflows.
    bound = log2(reading.B.largest) + log2(reading.A.largest) + log2(abs(reading.module.scale))
    return bound + log2(reading.module.rank) < log2(float_info.min)
