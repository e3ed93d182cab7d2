"""The checks of `loralens doctor`, one in each file, and the table of all of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from loralens.analysis.checks import (
    absorption,
    blocks,
    clients,
    combining_bug,
    copied,
    dead,
    finite,
    foreign_code,
    head,
    initialisation,
    larger_than_weight,
    low_bit,
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
    codes : mapping of str to str
        Code → what it means and why it matters, in one or two sentences.
    single : callable or None
        The function that checks one adapter.
    several : callable or None
        The function that checks two or more adapters together; its diagnoses name their ``adapter``.
    """

    codes: Mapping[str, str]
    single: Callable[[Examination], Iterable[Diagnosis]] | None = None
    several: Callable[[Sequence[Examination]], Iterable[Diagnosis]] | None = None


# Findings of one level are reported in this order: what makes a file unusable comes before what makes it wasteful.
CHECKS: tuple[Check, ...] = (
    Check(finite.CODES, single=finite.look),
    Check(head.CODES, single=head.look),
    Check(swapped.CODES, single=swapped.look),
    Check(names.CODES, single=names.look),
    Check(other_base.CODES, single=other_base.look),
    Check(other_base.OF_SEVERAL, several=other_base.look_at_all),
    Check(reader.CODES, single=reader.look),
    Check(foreign_code.CODES, single=foreign_code.look),
    Check(clients.CODES, single=clients.look),
    Check(zero.CODES, single=zero.look),
    Check(missing.CODES, single=missing.look),
    Check(copied.CODES, single=copied.look),
    Check(dead.CODES, single=dead.look),
    Check(scale.CODES, single=scale.look),
    Check(combining_bug.CODES, single=combining_bug.look),  # PEFT #1364 to 9a267b2, #3449
    Check(blocks.CODES, single=blocks.look),  # sd-scripts #839, #868
    Check(weighted_sum.CODES, several=weighted_sum.look),
    Check(larger_than_weight.CODES, single=larger_than_weight.look),
    Check(noise.CODES, single=noise.look),
    Check(absorption.CODES, single=absorption.look),
    Check(low_bit.CODES, single=low_bit.look),
    Check(initialisation.CODES, several=initialisation.look),
    Check(outlying.CODES, single=outlying.look),
    Check(spike.CODES, single=spike.look),
    Check(unused_rank.CODES, single=unused_rank.look),
)
