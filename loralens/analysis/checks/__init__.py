"""The checks of `loralens doctor`: one a file, and the table of them."""

from loralens.analysis.checks import (
    absorption,
    blocks,
    combination,
    combined,
    dominance,
    finite,
    initialisation,
    names,
    noise,
    outlying,
    reader,
    scale,
    spike,
    thrift,
    zero,
)
from loralens.analysis.checks.check import Check

# In the order in which findings of one level are told.
CHECKS: tuple[Check, ...] = (
    Check(finite.RULES, "adapter", one=finite.look),
    Check(names.RULES, "base", one=names.look),
    Check(reader.RULES, "adapter", one=reader.look),
    Check(zero.RULES, "adapter", one=zero.look),
    Check(scale.RULES, "adapter", one=scale.look),
    Check(combined.RULES, "adapter", one=combined.look),  # PEFT #1364 to 9a267b2, #3449
    Check(blocks.RULES, "adapter", one=blocks.look),  # sd-scripts #839, #868
    Check(combination.RULES, "several", all=combination.look),
    Check(dominance.RULES, "base", one=dominance.look),
    Check(noise.RULES, "adapter", one=noise.look),
    Check(absorption.RULES, "base", one=absorption.look),
    Check(initialisation.RULES, "several", all=initialisation.look),
    Check(outlying.RULES, "adapter", one=outlying.look),
    Check(spike.RULES, "adapter", one=spike.look),
    Check(thrift.RULES, "adapter", one=thrift.look),
)
