"""The checks of `loralens doctor`, one in each file, and the table of all of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from loralens.analysis.checks import (
    absorption,
    blocks,
    combining_bug,
    copied,
    dead,
    declared,
    dominance,
    finite,
    foreign_code,
    initialisation,
    missing,
    names,
    noise,
    other_base,
    outlying,
    reader,
    scale,
    spike,
    swapped,
    unused_rank,
    weighted_sum,
    zero,
)
from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination


@final
@dataclass(frozen=True, slots=True)
class Check:
    """A check of `loralens doctor`: a row of the table `CHECKS`.

    Attributes
    ----------
    rules : mapping of str to str
        Code → what it means and why it matters, in one or two sentences.
    single : callable or None
        The function that checks one adapter.
    several : callable or None
        The function that checks two or more adapters together; its diagnoses name their ``adapter``.
    """

    rules: Mapping[str, str]
    single: Callable[[Examination], Iterable[Diagnosis]] | None = None
    several: Callable[[Sequence[Examination]], Iterable[Diagnosis]] | None = None


# Findings of one level are reported in this order: what makes a file unusable comes before what makes it wasteful.
CHECKS: tuple[Check, ...] = (
    Check(finite.RULES, single=finite.look),
    Check(declared.RULES, single=declared.look),
    Check(swapped.RULES, single=swapped.look),
    Check(names.RULES, single=names.look),
    Check(other_base.RULES, single=other_base.look),
    Check(other_base.OF_SEVERAL, several=other_base.look_at_all),
    Check(reader.RULES, single=reader.look),
    Check(foreign_code.RULES, single=foreign_code.look),
    Check(zero.RULES, single=zero.look),
    Check(missing.RULES, single=missing.look),
    Check(copied.RULES, single=copied.look),
    Check(dead.RULES, single=dead.look),
    Check(scale.RULES, single=scale.look),
    Check(combining_bug.RULES, single=combining_bug.look),  # PEFT #1364 to 9a267b2, #3449
    Check(blocks.RULES, single=blocks.look),  # sd-scripts #839, #868
    Check(weighted_sum.RULES, several=weighted_sum.look),
    Check(dominance.RULES, single=dominance.look),
    Check(noise.RULES, single=noise.look),
    Check(absorption.RULES, single=absorption.look),
    Check(initialisation.RULES, several=initialisation.look),
    Check(outlying.RULES, single=outlying.look),
    Check(spike.RULES, single=spike.look),
    Check(unused_rank.RULES, single=unused_rank.look),
)
