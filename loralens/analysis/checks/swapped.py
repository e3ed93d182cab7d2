"""Adapters in which B and A were exchanged."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from loralens.analysis.checks.diagnosis import Diagnosis, share
from loralens.analysis.checks.examination import Examination
from loralens.analysis.readings.module import ModuleReading, relative_deviation
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.core.names import some

CODES = {
    "factors-swapped": "B and A seem to be exchanged, so that ΔW is another matrix (its transpose, if the factors were "
    "transposed too). A starts at random, and its rows stay equally long and reach all inputs alike. B starts at zero, "
    "and stays shorter and more uneven."
}
MOST = 0.8  # the share of modules that must look exchanged; of published adapters it is a third at most
LONGER = 10  # B of no published adapter is so many times as long as its A: it is at most three times as long
FEWEST = 4  # with fewer modules, all of them may look exchanged by chance
APART = 1.5  # to judge one module alone, A of all others must be longer than B of any of them by this factor
NEAR = 0.9  # and the suspected B must have at least this share of the length of the shortest A
ORTHOGONAL = 2e-3  # |cosine| of singular vectors: factors from an SVD show nothing of their initialisation
RANDOM = (True, "gaussian", "default", None)  # init_lora_weights under which A is random and B is zero
FIX = "exchange lora_A and lora_B of these modules, each transposed, or save the adapter again from its training"


class _Start(NamedTuple):
    """Traces of the initialisation in a trained pair."""

    A: float  # mean length of the rows of A
    B: float  # mean length of the columns of B
    even: bool  # whether B reaches all outputs more evenly than A the inputs
    equal: bool  # whether the columns of B are more equal in length than the rows of A

    @property
    def exchanged(self) -> bool:
        """Whether B looks like a random A: longer, and either more even over its side or much longer."""
        return self.B > self.A and (self.even or self.B > LONGER * self.A)


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report exchanged factors: as an error if their shapes do not fit the rank, else as a warning.

    Measured on 157 adapters, 151 of them published: none is reported, and if B and A of all their modules are
    exchanged, 150 are. The others were trained far from their initialisation, or have too few modules. If one module
    is exchanged, it is found in 93 % of trials on 18 of these adapters.
    """
    shapes = _by_shape(exam)
    if shapes:
        first = exam.readings[shapes[0]].module
        evidence = (
            f"in {share(len(shapes), len(exam.readings))} lora_A has {first.rank} rows and the update is "
            f"{first.shape[0]} × {first.shape[1]}, where r = {exam.setting('r')}: {some(shapes)}"
        )
        fix = "exchange lora_A and lora_B in the file"
        yield Diagnosis("error", "factors-swapped", evidence, fix)
        return
    # PiSSA, OLoRA and others start A and B from W, so neither is random or zero.
    if exam.setting("init_lora_weights") not in RANDOM:
        return
    starts = {name: start for name, one in exam.pairs.items() if (start := _traces(one))}
    if len(starts) < FEWEST:
        return
    if (count := sum(start.exchanged for start in starts.values())) >= MOST * len(starts):
        evidence = (
            f"in {share(count, len(starts))} the columns of B are longer than the rows of A, and reach all outputs "
            f"more evenly than A the inputs, or are more than {LONGER} times as long, as only a random A is"
        )
        yield Diagnosis("warning", "factors-swapped", evidence, FIX)
        return
    # A few modules show all signs by chance. So a single module is reported only if its B is about as long as the A of
    # the other modules, and its A about as short as their B.
    exchanged = [name for name, start in starts.items() if start.exchanged and start.even and start.equal]
    other_starts = [start for name, start in starts.items() if name not in exchanged]
    shortest, longest = min(start.A for start in other_starts), max(start.B for start in other_starts)
    for name in exchanged if shortest >= APART * longest else ():
        start = starts[name]
        if NEAR * shortest <= start.B and longest >= start.A * NEAR:
            evidence = (
                f"B is {start.B:.3g} long and A {start.A:.3g}, where in the other modules A is at least {shortest:.3g} "
                f"and B at most {longest:.3g}"
            )
            yield Diagnosis("warning", "factors-swapped", evidence, FIX, name)


def _by_shape(exam: Examination) -> list[str]:
    """Modules whose factors were exchanged without transposing: the update is r × r, and its rank is above r."""
    # At r = 1 the exchanged pair would be a number, which no weight is.
    rank = exam.setting("r")
    modules: Mapping[str, ModuleReading] = exam.readings
    if not isinstance(rank, int) or exam.adapter.format != "peft" or rank < 2:
        return []
    return [name for name, one in modules.items() if one.module.shape == (rank, rank) and one.module.rank > rank]


def _traces(reading: ModuleReading) -> _Start | None:
    """The traces of the initialisation; None for factors that have none, and for embeddings, where A starts at 0."""
    B, A, module = reading.B, reading.A, reading.module
    if not B or not A or not isinstance(module, LowRank) or module.rank < 2:
        return None
    if module.layout.kind in ("embedding", "merged") or max(B.skew, A.skew) < ORTHOGONAL:
        return None
    lengths = _mean(A.lengths), _mean(B.lengths)
    equal = relative_deviation(B.lengths) < relative_deviation(A.lengths)
    return _Start(*lengths, even=B.unevenness < A.unevenness, equal=equal)


def _mean(values: Array) -> float:
    return float(np.add.reduce(values) / values.size)  # as `mean`, which takes longer than the sum of few numbers
