"""NaN and Inf: numbers that no arithmetic survives."""

from collections.abc import Iterator

import numpy as np

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.patient import Patient
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank

RULES = {"non-finite": "A tensor holds NaN or Inf: every output of a model with this adapter will be NaN."}
FIX = "training diverged or a value overflowed its dtype: go back to an earlier checkpoint"


def look(patient: Patient) -> Iterator[Diagnosis]:
    """One diagnosis for every module and every other tensor that holds NaN or Inf."""
    for name, reading in patient.readings.items():
        if reading.spectrum is None:
            yield Diagnosis("error", "non-finite", _where(reading.module), FIX, name)
    for key, extra in patient.adapter.extra.items():
        count = _broken(extra.tensor.read())
        if count:
            evidence = f"{key} {_says(count, extra.tensor.size)}"
            yield Diagnosis("error", "non-finite", evidence, FIX, extra.module)


def _where(module: object) -> str:
    if not isinstance(module, LowRank):
        return "a factor holds NaN or Inf"
    counts = {"B": (_broken(module.B), module.B.size), "A": (_broken(module.A), module.A.size)}
    said = [f"{name} {_says(count, size)}" for name, (count, size) in counts.items() if count]
    return " and ".join(said) or "B·A overflows"


def _says(count: int, size: int) -> str:
    return f"holds {count} value{'' if count == 1 else 's'} that {'is' if count == 1 else 'are'} NaN or Inf, of {size}"


def _broken(array: Array) -> int:
    if array.dtype.kind in "iub":
        return 0
    plain = array.astype(np.float32) if array.dtype.itemsize < 4 else array
    return int(plain.size - np.count_nonzero(np.isfinite(plain)))
