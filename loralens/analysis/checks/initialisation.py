"""Adapters that were initialised with the same random A."""

from collections.abc import Iterator, Sequence
from math import floor

import numpy as np

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination
from loralens.analysis.compare.clusters import connected_groups
from loralens.analysis.compare.pairwise import SAME_START, known_mean, match_collection
from loralens.core.lazy import Array
from loralens.core.names import some
from loralens.linalg.rounding import sample_entries

CODES = {
    "shared-initialisation": "Adapters that were trained from one seed share the random start of A. Overlaps of A, or "
    "of the in side of ΔW, then show the seed and not the tasks."
}
ENTRIES = 512  # entries of every A: the cosine of adapters has the error 1/√(512·modules), 0.01 for 20 modules


def look(exams: Sequence[Examination]) -> Iterator[Diagnosis]:
    """Report every group of adapters with similar A, once, for its first adapter."""
    modules = match_collection([one.adapter for one in exams])
    cosines = np.full((len(modules), len(exams), len(exams)), np.nan)
    for table, module in zip(cosines, modules, strict=True):
        rows = {i: _sample_A(one, name) for i, (one, name) in enumerate(zip(exams, module.holders, strict=True))}
        with_A = {i: (row, rank) for i, (row, rank) in rows.items() if row is not None}
        for i, (x, r) in with_A.items():
            for j, (y, s) in with_A.items():
                if r == s:  # random numbers are drawn row by row, so other ranks show no common start
                    table[i, j] = x @ y
    similar = known_mean(cosines)
    for group in connected_groups(similar, SAME_START):
        if len(group) < 2:
            continue
        first, same_start = exams[group[0]], [exams[i] for i in group[1:]]
        # Members of a group need not all be similar to each other: each is similar to at least one, and this is stated.
        least = min(similar[i, j] for i in group for j in group if i != j and similar[i, j] >= SAME_START)
        # The cosine is rounded down, so that "or more" stays true.
        cosine = "cosine 1" if least > 1 - 1e-6 else f"cosine {floor(100 * least) / 100:.2f} or more"
        evidence = (
            f"its A has nearly the same direction as that of {some([one.path for one in same_start])} ({cosine}): they "
            "began from one random A, or belong to one run"
        )
        command = first.command("similarity", same_start[0].quoted, "--side out")
        fix = f"compare them on the side that the seed does not fix: `{command}`"
        yield Diagnosis("note", "shared-initialisation", evidence, fix, adapter=first.path)


def _sample_A(exam: Examination, name: str | None) -> tuple[Array | None, int]:
    """Some entries of A as a vector of length 1, and r; None if there is no A to compare."""
    reading = exam.readings.get(name) if name else None
    if reading is None or reading.A is None or not reading.A.lengths.any():
        return None, 0
    A = reading.module.A
    # The same entries in every adapter, because the shape alone decides which are drawn.
    row = A[sample_entries(A.shape, count=ENTRIES)].astype(np.float64)
    length = float(np.linalg.norm(row))
    return (row / length if length else None), reading.module.rank
