"""Scales that are probably wrong: zero, negative, very large or very small."""

from collections.abc import Callable, Iterator

from loralens.analysis.checks.diagnosis import Diagnosis, share
from loralens.analysis.checks.examination import Examination
from loralens.choices import Level
from loralens.core.lowrank import LowRank
from loralens.core.names import some

# Largest scale that is used on purpose, with room: people choose α/r up to 32, and the default of mlx-lm is 20. Below
# it, the scale alone shows no fault. A module too strong for its kind is an outlier, and with --base it dominates W.
LARGEST = 64.0
SMALLEST = 1 / 64  # smallest usual scale: kohya's default α = 1 reaches it at r = 64

CODES = {
    "scale-zero": "The scale is 0, so the module adds nothing; α = 0 means 0 to some programs and r to others.",
    "scale-negative": "The scale is negative: the update is taken off instead of added.",
    "scale-large": "The scale is larger than training uses. α may have been set for another rank, applied twice, or "
    "taken as the scale itself.",
    "scale-small": "The scale is very small: the α of another rank, or kohya's default of 1 at a high rank.",
    "scale-is-alpha": "The configuration's scale is its α, not α/r: some MLX tools used α as the multiplier.",
}
# Code → its level, whether a scale is suspicious, and what to do then. Small and negative scales are often meant: α = 1
# at a high rank is the default of kohya, and an adapter that is taken off again has a negative scale.
SUSPICIOUS: dict[str, tuple[Level, Callable[[float], bool], str]] = {
    "scale-zero": ("warning", lambda scale: scale == 0, "state α = r, or leave the modules out"),
    "scale-negative": ("note", lambda scale: scale < 0, "if it is not meant to be subtracted, negate it: `{negate}`"),
    "scale-large": (
        "warning",
        lambda scale: scale > LARGEST,
        "compare with the α and r of the training run; if it is wrong, put the run's value into the configuration",
    ),
    "scale-small": ("note", lambda scale: 0 < scale < SMALLEST, "compare with the α and r of the training run"),
}


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report every suspicious scale, once for all modules that have it."""
    for code, (level, wrong, fix) in SUSPICIOUS.items():
        hit = [name for name, one in exam.readings.items() if wrong(one.module.scale)]
        if not hit:
            continue
        module = exam.readings[hit[0]].module
        of_modules = "" if len(hit) == len(exam.readings) else f": {some(hit)}"
        evidence = f"scale {module.scale:.4g}, {module.scaling}, in {share(len(hit), len(exam.readings))}{of_modules}"
        fix = fix.format(negate=exam.writes("negate", "negated"))
        yield Diagnosis(level, code, evidence, fix, hit[0] if len(hit) == 1 else None)
    yield from _scale_is_alpha(exam)


def _scale_is_alpha(exam: Examination) -> Iterator[Diagnosis]:
    parameters = exam.setting("lora_parameters")
    if exam.adapter.format != "mlx" or not isinstance(parameters, dict) or "alpha" not in parameters:
        return
    # At rank 1, α and α/r are the same number.
    rank = max((one.module.rank for one in exam.readings.values() if isinstance(one.module, LowRank)), default=1)
    if parameters.get("scale") == parameters["alpha"] and rank > 1:
        evidence = f"lora_parameters has scale {parameters['scale']} and the same alpha, at rank {rank}: α/r would be "
        evidence += f"{parameters['alpha'] / rank:.4g}"
        fix = "if it was trained with α/r, write that as lora_parameters.scale in adapter_config.json"
        yield Diagnosis("warning", "scale-is-alpha", evidence, fix)
