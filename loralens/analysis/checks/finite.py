"""NaN and Inf in the adapter and in the weights of the base."""

from collections.abc import Iterator
from math import prod

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination
from loralens.analysis.inspection import count_non_finite
from loralens.core.lowrank import LowRank

CODES = {
    "non-finite": "A tensor holds NaN or Inf: every output of a model with this adapter will be NaN.",
    "base-non-finite": "A weight of the base holds NaN or Inf: its outputs are NaN with any adapter and without one.",
}
FIX = "training diverged or a value overflowed its dtype: go back to an earlier checkpoint"
BASE_FIX = "get the base model again: this copy is damaged, or was written in a dtype too narrow for it"


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report every module, every other tensor and every weight of the base that holds NaN or Inf."""
    for name, reading in exam.readings.items():
        if reading.spectrum is None:
            yield Diagnosis("error", "non-finite", _describe(reading.module), FIX, name)
    for key, extra in exam.adapter.extra.items():
        if count := count_non_finite(extra.tensor.read()):
            evidence = f"{key} {_count_text(count, extra.tensor.size)}"
            yield Diagnosis("error", "non-finite", evidence, FIX, extra.module or None)
    # The merge into such a weight was not checked, so the reason has to be reported.
    for name, count in exam.non_finite_weights.items():
        evidence = f"its weight in the base {_count_text(count, prod(exam.readings[name].module.shape))}"
        yield Diagnosis("error", "base-non-finite", evidence, BASE_FIX, name)


def _describe(module: object) -> str:
    if not isinstance(module, LowRank):
        return "a factor holds NaN or Inf"
    counts = {"B": (count_non_finite(module.B), module.B.size), "A": (count_non_finite(module.A), module.A.size)}
    broken_factors = [f"{name} {_count_text(count, size)}" for name, (count, size) in counts.items() if count]
    # A spectrum is missing only because of NaN or Inf. If both factors are finite, their product is not.
    return " and ".join(broken_factors) or "B·A overflows"


def _count_text(count: int, size: int) -> str:
    values = "value that is" if count == 1 else "values that are"
    return f"holds {count} {values} NaN or Inf, of {size}"
