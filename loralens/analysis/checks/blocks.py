"""Pairs that consist of several pairs side by side but have the α of only one of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from operator import itemgetter

import numpy as np

from loralens.analysis.checks.diagnosis import Diagnosis, share
from loralens.analysis.checks.examination import Examination
from loralens.analysis.readings.module import ModuleReading
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.core.names import some
from loralens.tables.numbers import whole_percent

CODES = {
    "concat-alpha": "Adapters that were joined side by side (sd-scripts' --concat) keep the α of the first, while "
    "the rank becomes the sum of all ranks. Everything is then too weak by the ratio of the ranks.",
    "split-qkv-alpha": "A fused projection trained in parts (split_qkv) is stored as one pair with a block-diagonal B "
    "whose α is that of one part: every program then applies 1/3 or 1/4 of what was trained.",
}
APART = 1.3  # smallest ratio of the lengths of two neighbouring rows in different blocks
ALIKE = 1.15  # largest ratio within a block; over all rows of most published adapters it is 1.04 to 1.12
MOST = 0.9  # the share of the modules that must have blocks at the same rows
FEWEST = 4  # in fewer modules than this, equal blocks may be chance
SPARSE = 0.4  # with a smaller share of zeros B has no blocks, because even two blocks leave half of B zero


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report blocks that the metadata, the lengths of the rows of A, or the zeros of B suggest."""
    yield from _look_for_split(exam)
    pairs = {name: reading for name, reading in exam.pairs.items() if isinstance(reading.module, LowRank)}
    declared_rank = _number((exam.adapter.metadata or {}).get("ss_network_dim"))
    plain = [reading for reading in pairs.values() if _block_diagonal(reading) == 1]
    # `scaling.rank` comes first, because an expanded LoHa has a larger rank than it was trained with.
    ranks = {reading.module.scaling.rank or reading.module.rank for reading in plain}
    # A scale of 1 or more is not too weak: the program that joined the adapters has raised α.
    if (
        declared_rank
        and len(ranks) == 1
        and (rank := ranks.pop()) > declared_rank
        and rank % declared_rank == 0
        and _scale(plain[0]) < 1
    ):
        evidence = f"ss_network_dim says {declared_rank:g}, the pairs have rank {rank}; scale {plain[0].module.scaling}"
        yield Diagnosis("warning", "concat-alpha", evidence, _stronger(rank / declared_rank))
        return  # the lengths of the rows would only say the same again
    blocks = row_length_blocks(plain)
    if blocks and _scale(plain[0]) < 1:
        evidence = (
            f"in at least {whole_percent(MOST)} of the modules the lengths of the rows of A form blocks of {blocks} "
            f"rows, as in adapters that were joined side by side; scale {plain[0].module.scaling}"
        )
        yield Diagnosis("warning", "concat-alpha", evidence, _stronger(sum(blocks) / blocks[0]))


def row_length_blocks(readings: Sequence[ModuleReading]) -> list[int]:
    """The sizes of blocks of rows of A with different lengths, if nearly all modules have the same; else empty.

    A trained A stays near its random start, whose rows are equally long. Two adapters side by side, with different
    weights or scales, therefore show as a step in the lengths.
    """
    if len(readings) < FEWEST:
        return []
    lengths = [one.A.lengths for one in readings if one.A]
    # In most modules no two neighbours differ, and these are found for all modules of one rank at once.
    stepped = _with_steps(lengths)
    cuts = Counter(_cuts(rows) if i in stepped else () for i, rows in enumerate(lengths))
    # Blocks that come from joining adapters are at the same rows in all modules; chance gives each module its own.
    commonest, times = max(cuts.items(), key=itemgetter(1), default=((), 0))
    if not commonest or times < MOST * len(lengths):
        return []
    return [int(n) for n in np.diff(commonest)]


def _with_steps(lengths: Sequence[Array]) -> set[int]:
    """The places of the modules in which two neighbouring rows differ clearly in length, or a row is 0."""
    by_rank: dict[int, list[int]] = {}
    for i, rows in enumerate(lengths):
        by_rank.setdefault(len(rows), []).append(i)
    stepped: set[int] = set()
    for places in by_rank.values():
        rows = np.stack([lengths[i] for i in places])
        with np.errstate(divide="ignore", invalid="ignore"):  # of rows of 0, which come out as NaN or Inf
            steps = np.abs(np.diff(np.log(rows), axis=1))
        smooth = (steps <= np.log(APART)).all(axis=1)
        stepped.update(places[i] for i in np.flatnonzero(~smooth).tolist())
    return stepped


def _cuts(lengths: Array) -> tuple[int, ...]:
    """The first row of every block, and r; empty if there is only one block or the blocks are not clear."""
    if len(lengths) < 2 or not lengths.all():
        return ()
    steps = np.abs(np.diff(np.log(lengths)))
    # Between the two thresholds nothing is decided: the lengths there are neither one block nor clearly several.
    cuts = [0, *(np.flatnonzero(steps > np.log(APART)) + 1).tolist(), len(lengths)]
    parts = [lengths[a:b] for a, b in pairwise(cuts)]
    clear = all(part.max() <= ALIKE * part.min() and len(part) > 1 for part in parts)
    return tuple(cuts) if clear and len(parts) > 1 else ()


def _look_for_split(exam: Examination) -> Iterator[Diagnosis]:
    by_count: dict[int, list[str]] = {}
    for name, reading in exam.pairs.items():
        count = _block_diagonal(reading)
        if count > 1 and 0 < _scale(reading) <= 1 / count:
            by_count.setdefault(count, []).append(name)
    for count, names in by_count.items():
        module = exam.readings[names[0]].module
        evidence = (
            f"B is block-diagonal, {count} parts of rank {module.rank // count}, in "
            f"{share(len(names), len(exam.readings))}: {some(names)}; scale {module.scaling}"
        )
        yield Diagnosis("warning", "split-qkv-alpha", evidence, _stronger(count), names[0] if len(names) == 1 else None)


def _block_diagonal(reading: ModuleReading) -> int:
    """The number of diagonal blocks of B: of equal width and any height, with zeros outside; 1 for an ordinary B."""
    module, factor = reading.module, reading.B
    # A pair of kind "merged" is block-diagonal by its format, with the scale that belongs to it.
    if not factor or not isinstance(module, LowRank) or module.layout.kind == "merged" or factor.zeros < SPARSE:
        return 1
    nonzero = module.B != 0
    for count in range(module.rank // 2, 1, -1):  # most blocks first; every block has at least two columns
        if module.rank % count == 0 and _is_block_diagonal(nonzero, count):
            return count
    return 1


def _is_block_diagonal(nonzero: Array, count: int) -> bool:
    width = nonzero.shape[1] // count
    used = np.stack([nonzero[:, i * width : (i + 1) * width].any(axis=1) for i in range(count)])  # (count, out)
    first = [int(np.flatnonzero(rows)[0]) if rows.any() else -1 for rows in used]
    return bool((used.sum(axis=0) <= 1).all()) and min(first) >= 0 and first == sorted(first)


def _scale(reading: ModuleReading) -> float:
    """The scale α/r of a module whose file states α, else 1."""
    return (
        reading.module.scale if reading.module.scaling.stated and reading.module.scaling.formula == "alpha/r" else 1.0
    )


def _stronger(factor: float) -> str:
    return f"if so, use it at {factor:g} times the strength, or multiply its alphas by {factor:g}"


def _number(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if value > 0 else None
