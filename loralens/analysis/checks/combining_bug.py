"""Adapters that PEFT combined wrongly: by an SVD with α/r applied twice, or √r too strong with rsLoRA."""

from collections.abc import Iterator
from math import sqrt

import numpy as np

from loralens.analysis.checks.blocks import row_length_blocks
from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination
from loralens.analysis.readings.module import ModuleReading

CODES = {
    "svd-combined": "PEFT's add_weighted_adapter with combination_type='svd' (and with the ties and dare variants of "
    "it) applied α/r of the sources twice from 0.8 to at least 0.19.1; 0.21.2 does not. This is a suspicion, because "
    "one file cannot show the sources.",
    "rslora-combined": "PEFT's add_weighted_adapter sets α = r and keeps use_rslora, so the result is √r too strong, "
    "up to 0.21.2 at least.",
}
ORTHOGONAL = 2e-3  # |cosine| up to which singular vectors count as orthogonal after rounding to float32 or float16
ORTHOGONAL_BF16 = 3e-2  # the same in bfloat16, which has three bits fewer than float16
FIXED = (0, 21, 2)  # the first version of PEFT that is known to be right; 0.19.1 was measured to scale twice
MOST = 0.9  # the share of the modules that must show the structure


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report at most one bug. The structure of the factors shows an SVD, and α = r shows that PEFT made the factors."""
    pairs = {name: one for name, one in exam.pairs.items() if one.module.rank > 1}
    alpha_is_rank = all(one.module.scaling.alpha == one.module.rank for one in pairs.values())
    if exam.adapter.format != "peft" or not pairs or not alpha_is_rank:
        return
    decomposed = sum(_is_svd(one) for one in pairs.values())
    rank = next(iter(pairs.values())).module.rank
    svd = decomposed >= MOST * len(pairs)
    cut = row_length_blocks(list(pairs.values()))
    # rsLoRA first: adapters joined side by side ("cat") are too strong by √r as well, and no SVD shows them.
    if exam.setting("use_rslora") and (svd or cut):
        how = f"the lengths of the rows of A form blocks of {cut} rows"
        if svd:
            how = f"{decomposed} of {len(pairs)} modules are singular vectors"
        evidence = (
            f"{how}, which training does not produce; α = r = {rank} with rsLoRA gives the scale √r = {sqrt(rank):.3g}"
        )
        fix = "set use_rslora to false in adapter_config.json, unless its numbers were made with it"
        yield Diagnosis("warning", "rslora-combined", evidence, fix)
    elif svd and _version(exam.setting("peft_version")) < FIXED:
        version = exam.setting("peft_version")
        evidence = (
            f"in {decomposed} of {len(pairs)} modules A is orthonormal and B orthogonal with falling columns, and α = r"
            f" = {rank}: the result of an SVD, as PEFT {version or '(version unknown)'} combines adapters"
        )
        fix = f"give its sources too, to find their weights: `{exam.command('doctor', 'SOURCE…')}`"
        yield Diagnosis("warning", "svd-combined", evidence, fix)


def _is_svd(reading: ModuleReading) -> bool:
    """Whether the rows of A are orthonormal and the columns of B orthogonal, with decreasing lengths."""
    A, B = reading.A, reading.B
    assert A
    assert B
    # PEFT stores U·S as B and Vᵀ as A: unit rows of A, and columns of B as long as the singular values, which fall.
    limit = ORTHOGONAL_BF16 if reading.module.dtype.name == "bfloat16" else ORTHOGONAL
    unit = np.abs(A.lengths[A.lengths > 0] - 1).max(initial=0.0) < limit
    falling = bool((np.diff(B.lengths) <= limit * B.lengths[0]).all())
    return bool(unit) and A.skew < limit and B.skew < limit and falling


def _version(text: object) -> tuple[int, ...]:
    """The numbers of a version, of ``0.19.2.dev0@1a2b3c`` too; () if there is none, which counts as an old one."""
    parts = str(text or "").split("@")[0].split(".")
    return tuple(int(part) for part in parts[:3] if part.isdecimal())
