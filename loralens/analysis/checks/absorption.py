"""Updates that are lost to rounding when they are merged into weights of a narrow dtype."""

from collections.abc import Iterator

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination
from loralens.analysis.checks.merge_effect import MergeEffect
from loralens.linalg.rounding import survivors
from loralens.tables.numbers import fixed, whole_percent

CODES = {
    "below-rounding": "‖ΔW‖ is smaller than the error of rounding W to the dtype of the merge, in which the base may "
    "already be stored. The effect of the module is lost in that error.",
    "merge-lossy": "A merge into weights of this dtype rounds much of the update away, or hides it in the error of "
    "rounding W itself. The merged model is then not the base with the adapter.",
}
# In bfloat16, updates of 1 % of ‖W‖ arrive at their full strength; at 0.2 %, 82 % of the strength is left.
LEAST_GAIN = 0.95  # the share of its strength that the merged update must have
LARGEST_ERROR = 0.2  # the largest error relative to ‖ΔW‖; it is reached at ‖ΔW‖/‖W‖ = 0.8 % in bfloat16
FIX = "keep float32 when merging (`loralens merge --dtype f32`), or serve the adapter unmerged"


def look(exam: Examination) -> Iterator[Diagnosis]:
    """One diagnosis for every module, the largest error first."""
    for name, effect in sorted(exam.merge_effects.items(), key=lambda item: -item[1].rounding.error):
        reading, rounding = exam.readings[name], effect.rounding
        assert reading.spectrum
        out, in_ = reading.module.shape
        noise = rounding.noise * (out * in_) ** 0.5  # from the error of one entry to the norm over all entries
        # Only the more serious of the two is reported: an update below the rounding error is lossy in any case.
        if reading.spectrum.frobenius < noise:
            ratio = reading.spectrum.frobenius / noise
            evidence = f"‖ΔW‖ is {ratio:.2g} times the rounding error of W in {effect.dtype}; {_cost(effect)}"
            yield Diagnosis("warning", "below-rounding", evidence, FIX, name)
        elif rounding.gain < LEAST_GAIN or rounding.error > LARGEST_ERROR:
            lost = rounding.error * reading.spectrum.frobenius / (out * in_) ** 0.5  # error of one entry
            alive = survivors(reading.spectrum.s, lost, reading.module.shape)
            evidence = f"{_cost(effect)}; {alive} of {reading.spectrum.numerical_rank} directions rise above the noise"
            yield Diagnosis("warning", "merge-lossy", evidence, FIX, name)


def _cost(effect: MergeEffect) -> str:
    rounding = effect.rounding
    error, gain, unmoved = map(whole_percent, (rounding.error, rounding.gain, rounding.unmoved))
    return (
        f"a merge into {effect.dtype} keeps {gain} of its strength with an error of {error}, and leaves {unmoved} "
        f"of the weights unchanged (‖ΔW‖/‖W‖ {fixed('.2%')(effect.ratio)})"
    )
