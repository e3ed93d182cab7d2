"""The checks of `loralens doctor`, one in each file, and the table of all of them."""

from loralens.analysis.checks import (
    absorption,
    bases,
    blocks,
    combination,
    combined,
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
    outlying,
    reader,
    scale,
    spike,
    swapped,
    thrift,
    zero,
)
from loralens.analysis.checks.check import Check

# Findings of one level are reported in this order: what makes a file unusable comes before what makes it wasteful.
CHECKS: tuple[Check, ...] = (
    Check(finite.RULES, one=finite.look),
    Check(declared.RULES, one=declared.look),
    Check(swapped.RULES, one=swapped.look),
    Check(names.RULES, one=names.look),
    Check(bases.RULES, one=bases.look),
    Check(bases.OF_SEVERAL, all=bases.look_at_all),
    Check(reader.RULES, one=reader.look),
    Check(foreign_code.RULES, one=foreign_code.look),
    Check(zero.RULES, one=zero.look),
    Check(missing.RULES, one=missing.look),
    Check(copied.RULES, one=copied.look),
    Check(dead.RULES, one=dead.look),
    Check(scale.RULES, one=scale.look),
    Check(combined.RULES, one=combined.look),  # PEFT #1364 to 9a267b2, #3449
    Check(blocks.RULES, one=blocks.look),  # sd-scripts #839, #868
    Check(combination.RULES, all=combination.look),
    Check(dominance.RULES, one=dominance.look),
    Check(noise.RULES, one=noise.look),
    Check(absorption.RULES, one=absorption.look),
    Check(initialisation.RULES, all=initialisation.look),
    Check(outlying.RULES, one=outlying.look),
    Check(spike.RULES, one=spike.look),
    Check(thrift.RULES, one=thrift.look),
)
