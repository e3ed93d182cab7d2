"""Checks of an adapter against its base: names, shapes, another base, updates too large for W or lost in rounding."""

from collections.abc import Iterator, Sequence
from pathlib import PurePath

from loralens.analysis.diagnosis import CodesPrediction, Diagnosis, Examination
from loralens.analysis.merge_effect import MergeEffect
from loralens.core.base_model import contradiction, find_contradiction
from loralens.core.messages import quote_word
from loralens.linalg.rounding import survivors
from loralens.tables.numbers import count, fixed, number, percent, whole_percent


def find_unmatched_modules(exam: Examination) -> Iterator[Diagnosis]:
    """Report every module without a weight; only the adapter if no module has one."""
    # One error about the adapter says more than the same one for each of hundreds of modules.
    if reason := exam.unmatched.get(""):
        yield Diagnosis("error", "base-mismatch", f"this is not its base: {reason[0]}", reason[1])
        return
    for name, (what, fix) in exam.unmatched.items():
        yield Diagnosis("error", "base-mismatch", what, fix, name)


def find_other_base(exam: Examination) -> Iterator[Diagnosis]:
    """Report a base that is not the one that the adapter names."""
    if exam.base is None or not exam.adapter.base_model:
        return
    if why := contradiction(exam.named, exam.base):
        evidence = f"it names {exam.adapter.base_model} as its base, and this is another: {why}"
        yield Diagnosis("warning", "base-differs", evidence, "give the base that it was trained on")


def find_different_bases(exams: Sequence[Examination]) -> Iterator[Diagnosis]:
    """Report adapters of different bases, once, for the first adapter."""
    paths, adapters = [exam.path for exam in exams], [exam.adapter for exam in exams]
    if difference := find_contradiction(paths, adapters, [exam.named for exam in exams]):
        yield Diagnosis("warning", "bases-differ", difference, "take adapters of one base", adapter=exams[0].path)


LARGEST = 1.0  # largest ‖ΔW‖/‖W‖ without a diagnosis: trained adapters have at most a tenth of it, 0.001 to 0.1


def find_dominating_updates(exam: Examination) -> Iterator[Diagnosis]:
    """Report every such module, the largest ratio first."""
    for name, effect in sorted(exam.merge_effects.items(), key=lambda item: -item[1].ratio):
        if effect.ratio > LARGEST:
            evidence = f"‖ΔW‖ is {effect.ratio:.3g} times ‖W‖"
            fix = f"check that this is its base, and its scale: `{exam.command('inspect')}`"
            yield Diagnosis("warning", "update-dominates", evidence, fix, name)


# In bfloat16, updates of 1 % of ‖W‖ arrive at their full strength; at 0.2 %, 82 % of the strength is left.
LEAST_GAIN = 0.95  # the share of its strength that the merged update must have
LARGEST_ERROR = 0.2  # the largest error relative to ‖ΔW‖; it is reached at ‖ΔW‖/‖W‖ = 0.8 % in bfloat16
FIX = "keep float32 when merging (`loralens merge --dtype f32`), or serve the adapter unmerged"


def find_lossy_merges(exam: Examination) -> Iterator[Diagnosis]:
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


# Noise relative to the update. At 3 to 8, adapters kept 85 % and more of the loss that they gain; at 22 they did not.
NOISY = 15.0
LOW_BIT_FIX = (
    "serve the adapter unmerged (for llama.cpp: `loralens convert --to gguf`), or merge in floats "
    "(`loralens merge --dtype bf16`)"
)


def predict_merge_into_codes(exam: Examination) -> Iterator[Diagnosis]:
    """One diagnosis for the adapter, and one for every module that is too weak, the weakest first."""
    expected = exam.codes
    if expected is None:
        return
    own = expected.own_error
    yield Diagnosis(
        "note",
        "codes-merge",
        f"merged into the codes of the base ({expected.layouts}) it arrives with a gain of {expected.gain:.3f}"
        f"{'' if own is None else f' and an error of {number(own)} in its own directions'}; it asks for "
        f"{number(expected.mean_move)} steps of a code on average, so {percent(expected.changed)} of the codes change, "
        f"{percent(expected.clipped)} are clipped, and the noise is {number(expected.noise)} times the update "
        f"({count(len(expected.noises), 'module')})",
        _merge_command(exam, expected),
    )
    for name, noise in sorted(expected.noises.items(), key=lambda item: -item[1]):
        if noise > NOISY:
            evidence = f"merged into the codes of the base, the noise is {noise:.0f} times the update"
            yield Diagnosis("warning", "codes-weak", evidence, LOW_BIT_FIX, name)


def _merge_command(exam: Examination, expected: CodesPrediction) -> str:
    """The command that merges the adapter into the codes; empty if its noise would be too large."""
    if expected.noise > NOISY or not expected.base:
        return ""
    base = PurePath(expected.base)
    # A base that is one file becomes one file, whose suffix decides the container.
    suffix = base.suffix if base.suffix in (".gguf", ".safetensors") else ""
    target = quote_word(str(PurePath(exam.path).with_suffix("").name or "adapter") + f"-merged{suffix}")
    command = exam.command("merge", "--base", quote_word(expected.base), "--bits", "keep", "-o", target)
    return f"`{command}` merges it into the codes"
