"""Rows of B and columns of A that are exactly zero: outputs that never change, inputs that are never read."""

from collections.abc import Iterator

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination
from loralens.core.lowrank import LowRank

CODES = {
    "dead-rows": "Rows of B are exactly zero: these outputs are never moved. A shard was not saved, the tensor was "
    "padded, or they were pruned on purpose.",
    "dead-columns": "Columns of A are exactly zero, although A starts at random: these inputs are never read. A shard "
    "was not saved, the tensor was padded, or they were pruned on purpose.",
}
LEAST = 0.01  # share of the rows or columns. Published adapters have none at all; narrow dtypes leave single ones
DESIGNED = ("embedding", "merged")  # tokens that never occurred, and projections that were not adapted
FIX = "compare the shapes with those of the training, and save it again; nothing is wrong if they were pruned"


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report every such module and side, the largest share first."""
    dead_sides = []
    for name, reading in exam.pairs.items():
        module = reading.module
        if not isinstance(module, LowRank) or module.layout.kind in DESIGNED:
            continue
        for code, factor, size in (("dead-rows", reading.B, 0), ("dead-columns", reading.A, 1)):
            of = module.shape[size]
            if factor and factor.dead > LEAST * of:
                what = "rows of B" if size == 0 else "columns of A"
                dead_sides.append((-factor.dead / of, name, code, f"{factor.dead} of {of} {what} are zero"))
    for _, name, code, evidence in sorted(dead_sides, key=lambda side: (side[0], side[2])):
        yield Diagnosis("warning", code, evidence, FIX, name)
