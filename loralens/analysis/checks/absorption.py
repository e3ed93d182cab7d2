"""Updates that merging into narrow weights would swallow."""

from collections.abc import Iterator

from loralens.analysis.checks.base import Landing
from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.patient import Patient
from loralens.core.adapter import Level
from loralens.linalg.rounding import survivors

RULES = {
    "below-rounding": "‖ΔW‖ is smaller than the error that rounding W to its dtype has already made: what the module "
    "adds is lost in it.",
    "merge-lossy": "Merged into weights of this dtype, much of the update is rounded away: the merged model is not the "
    "base with the adapter.",
}
LEAST_GAIN = 0.95  # of its strength must arrive
LARGEST_ERROR = 0.2  # of ‖ΔW‖ may be lost: reached at ‖ΔW‖/‖W‖ = 0.8 % in bfloat16
FIX = "keep float32 when merging (`loralens merge --dtype f32`), or serve the adapter unmerged"


def look(patient: Patient) -> Iterator[Diagnosis]:
    """One diagnosis for every module, the largest error first; a note where the dtype is only supposed."""
    for name, landing in sorted(patient.landings.items(), key=lambda item: -item[1].rounding.error):
        reading, rounding = patient.readings[name], landing.rounding
        assert reading.spectrum
        out, in_ = reading.module.shape
        noise = rounding.noise * (out * in_) ** 0.5
        level: Level = "note" if landing.supposed else "warning"
        if reading.spectrum.frobenius < noise:
            ratio = reading.spectrum.frobenius / noise
            evidence = f"‖ΔW‖ is {ratio:.2g} of the rounding error of W in {landing.dtype}; {_cost(landing)}"
            yield Diagnosis(level, "below-rounding", evidence, FIX, name)
        elif rounding.gain < LEAST_GAIN or rounding.error > LARGEST_ERROR:
            alive = survivors(reading.spectrum.s, rounding.noise, reading.module.shape)
            evidence = f"{_cost(landing)}; {alive} of {reading.spectrum.numerical_rank} directions rise above the noise"
            yield Diagnosis(level, "merge-lossy", evidence, FIX, name)


def _cost(landing: Landing) -> str:
    told, verb = landing.rounding, "would be" if landing.supposed else "is"
    return (
        f"merged into {landing.dtype} it {verb} {told.error:.0%} off at {told.gain:.0%} of its strength, "
        f"{told.unmoved:.0%} of the weights unmoved (‖ΔW‖/‖W‖ {landing.ratio:.2%})"
    )
