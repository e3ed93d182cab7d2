"""Checks for damage: NaN, modules that are 0, missing, copied or cut, and factors that were exchanged."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from math import prod
from typing import NamedTuple

import numpy as np

from loralens.analysis.diagnosis import Diagnosis, Examination, share
from loralens.analysis.inspection import count_non_finite
from loralens.analysis.readings import ModuleReading, relative_deviation
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.core.names import some, weight_name

FIX = "training diverged or a value overflowed its dtype: go back to an earlier checkpoint"
BASE_FIX = "get the base model again: this copy is damaged, or was written in a dtype too narrow for it"


def find_non_finite(exam: Examination) -> Iterator[Diagnosis]:
    """Report every module, every other tensor and every weight of the base that holds NaN or Inf."""
    for name, reading in exam.readings.items():
        if reading.spectrum is None:
            yield Diagnosis("error", "non-finite", _describe(reading.module), FIX, name)
    for key, extra in exam.adapter.extra.items():
        if count := count_non_finite(extra.tensor.read()):
            evidence = f"{key} {_count_text(count, extra.tensor.size)}"
            yield Diagnosis("error", "non-finite", evidence, FIX, extra.module or None)
    # The merge into such a weight was not checked, so the reason has to be reported.
    for name, count in exam.non_finite_weights.items():
        evidence = f"its weight in the base {_count_text(count, prod(exam.readings[name].module.shape))}"
        yield Diagnosis("error", "base-non-finite", evidence, BASE_FIX, name)


def _describe(module: object) -> str:
    if not isinstance(module, LowRank):
        return "a factor holds NaN or Inf"
    counts = {"B": (count_non_finite(module.B), module.B.size), "A": (count_non_finite(module.A), module.A.size)}
    broken_factors = [f"{name} {_count_text(count, size)}" for name, (count, size) in counts.items() if count]
    # A spectrum is missing only because of NaN or Inf. If both factors are finite, their product is not.
    return " and ".join(broken_factors) or "B·A overflows"


def _count_text(count: int, size: int) -> str:
    values = "value that is" if count == 1 else "values that are"
    return f"holds {count} {values} NaN or Inf, of {size}"


def find_zero_updates(exam: Examination) -> Iterator[Diagnosis]:
    """Report every module whose ΔW is 0 although its scale is not."""
    drop = exam.compress("trained", "--energy 1 --drop-dead")
    untrained = f"never trained: check `target_modules` in the training code; or leave them out: `{drop}`"
    for name, reading in exam.readings.items():
        # A scale of 0 has a finding of its own, whatever the factors are.
        if reading.spectrum is not None and reading.spectrum.spectral == 0 and reading.module.scale != 0:
            yield Diagnosis("warning", "zero-update", _reason(reading), untrained, name)


def _reason(reading: ModuleReading) -> str:
    zero = [name for name, factor in (("B", reading.B), ("A", reading.A)) if factor and not factor.lengths.any()]
    if zero:
        return "B and A are all zero" if len(zero) == 2 else f"{zero[0]} is all zero"
    return "B·A is zero" if reading.A else "ΔW is zero"


LEAST = 0.01  # share of the rows or columns. Published adapters have none at all; narrow dtypes leave single ones
DESIGNED = ("embedding", "merged")  # tokens that never occurred, and projections that were not adapted
DEAD_FIX = "compare the shapes with those of the training, and save it again; nothing is wrong if they were pruned"


def find_dead_sides(exam: Examination) -> Iterator[Diagnosis]:
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
        yield Diagnosis("warning", code, evidence, DEAD_FIX, name)


MINORITY = 0.5  # if a larger share of the modules has copies, sharing is the design of the method
GROUPS = 2  # more groups of equal factors are a design too, such as q, k and v of every block with one A


def find_copies(exam: Examination) -> Iterator[Diagnosis]:
    """Report every copy that is an exception as a warning, and sharing that is the rule as a note.

    Modules with ΔW = 0 are left out: untrained copies of B = 0 are equal everywhere.
    """
    # Hashes instead of numbers, so that nothing is read again and each module is looked up once.
    pairs = {name: (what.B.digest, what.A.digest) for name, what in exam.pairs.items() if what.B and what.A}
    shared_pairs = _groups(pairs)
    copies = {name: first for first, *copies_of_it in shared_pairs for name in copies_of_it}
    if len(copies) <= MINORITY * len(pairs):
        fix = "save the module again from its training, or leave it out: what it had learned is not in the file"
        for name, first in copies.items():
            evidence = f"its B and A are those of {first}, number for number"
            yield Diagnosis("warning", "module-copied", evidence, fix, name)
    else:
        count = len(copies) + len(shared_pairs)
        evidence = f"{share(count, len(pairs))} share their B and A with another: {some(shared_pairs[0])}"
        yield Diagnosis("note", "factor-shared", evidence)
        return
    for i, factor in enumerate("BA"):
        # A copied module has both factors of another one, and was reported above.
        groups = _groups({name: digests[i] for name, digests in pairs.items() if name not in copies})
        members = sum(map(len, groups))
        if len(groups) > GROUPS or members > MINORITY * len(pairs):
            what = f"one {factor}" if len(groups) == 1 else f"{len(groups)} {factor}"
            evidence = f"{share(members, len(pairs))} have {what} between them: {some(groups[0])}"
            yield Diagnosis("note", "factor-shared", evidence)
            continue
        for first, *copies_of_it in groups:
            for name in copies_of_it:
                evidence = f"its {factor} is that of {first}, number for number"
                yield Diagnosis("warning", "factor-copied", evidence, "save the module again from its training", name)


def _groups(digests: Mapping[str, object]) -> list[list[str]]:
    """Groups of two or more names with the same digest."""
    members: dict[object, list[str]] = {}
    for name, digest in digests.items():
        members.setdefault(digest, []).append(name)
    return [names for names in members.values() if len(names) > 1]


FEWEST = 4  # with fewer blocks it is not clear that they form a grid
MOST = 0.1  # the share of blocks (at least one block) that may lack a module; if more lack it, that is the design
HOLES = 0.05  # the share of the grid that may be missing; a UNet's lowest block has no attention, a quarter of the grid
LONGEST = 9  # digits of a block number at most: a hostile file could have a gap of any length
DEEPEST = 64  # parts of a name at most: a hostile file could have names of any length
# What leads only to the next block, which the last one lacks: in SD3, Mochi, Swin and the two sides of a UNet.
TO_NEXT = re.compile(r"(^|[._])(to_add_out|ff_context|context_block|(down|up)sample(rs?)?)([._]|$)")
CHOSEN = ("layers_to_transform", "exclude_modules", "layer_replication")  # settings that leave modules out on purpose

Place = tuple[str, ...]


def find_missing_modules(exam: Examination) -> Iterator[Diagnosis]:
    """Report every hole in an otherwise full grid of blocks and modules."""
    if any(exam.setting(key) for key in CHOSEN):
        return
    # Experts of one stack are one weight.
    names = dict.fromkeys(map(weight_name, exam.adapter))
    fix = "take it from the training's own checkpoint; nothing is wrong if it was left out on purpose"
    for name, evidence in missing_modules(names).items():
        yield Diagnosis("warning", "module-missing", evidence, fix, name)


def missing_modules(names: Collection[str]) -> dict[str, str]:
    """The names that would fill holes of a grid → the evidence for each hole.

    A name is split at its dots and underscores, so that every dialect has the same grids. Every number in a name
    defines a grid: its blocks are the paths up to that number, and its modules the rest of the names behind it. A block
    with a module that the others lack, such as the dense block of a mixture of experts, is not compared.
    """
    present = {re.sub(r"[._]", ".", name) for name in names}
    spelling: dict[Place, str] = {}
    grids: dict[Place, dict[Place, set[Place]]] = {}
    for name in names:
        path = tuple(re.split(r"[._]", name))
        if len(path) > DEEPEST:
            continue
        spelling.setdefault(_skeleton(path), name)
        for i, part in enumerate(path):
            if part.isdecimal():
                skeleton = _skeleton(path[: i + 1])
                grids.setdefault(skeleton, {}).setdefault(path[: i + 1], set()).add(path[i + 1 :])
    missing: dict[Place, str] = {}
    for skeleton, blocks in grids.items():
        if len(blocks) >= FEWEST:
            missing |= _holes(blocks) | _gap(skeleton, blocks)
    return {_spell(path, spelling): evidence for path, evidence in missing.items() if ".".join(path) not in present}


def _holes(blocks: Mapping[Place, set[Place]]) -> dict[Place, str]:
    """The modules that a few blocks lack and all others have; none if many are missing.

    A block with a module that the others lack is left out, because that module may take the place of another one.
    """
    counts = Counter(module for modules in blocks.values() for module in modules)
    few = max(1, int(MOST * len(blocks)))
    usual = {module for module, count in counts.items() if count >= len(blocks) - few}
    holes = [(block, module) for block, modules in blocks.items() if modules <= usual for module in usual - modules]

    def number(block: Place) -> int:
        return int(block[-1]) if len(block[-1]) < LONGEST else -1

    rows = {block[:-1] for block in blocks}
    last = {max((block for block in blocks if block[:-1] == row), key=number) for row in rows}
    holes = [(block, module) for block, module in holes if block not in last or not TO_NEXT.search("_".join(module))]
    if len(holes) > max(1, HOLES * len(usual) * len(blocks)):
        return {}
    return {
        block + module: f"{counts[module]} of {len(blocks)} blocks have {'_'.join(module)}, and this one does not"
        for block, module in sorted(holes)
    }


def _gap(skeleton: Place, blocks: Mapping[Place, set[Place]]) -> dict[Place, str]:
    """The modules of the one block that is missing between the first and the last of a single row of blocks."""
    # If names have several numbers, as in a UNet, some outer blocks lack inner blocks by design. The input blocks of an
    # original UNet are of several sorts under one row of numbers: 3 and 6 of SDXL halve the image, without attention.
    if skeleton.count("#") != 1 or skeleton[-3:-1] == ("input", "blocks"):
        return {}
    written = sorted((block[-1] for block in blocks if len(block[-1]) < LONGEST), key=int)
    numbers = list(map(int, written))
    # Exactly one number is missing in between; a missing first or last block leaves no trace.
    if not numbers or numbers[-1] - numbers[0] != len(numbers):
        return {}
    (absent,) = {*range(numbers[0], numbers[-1] + 1)} - {*numbers}
    # Numbers may have leading zeros; the missing one is then written alike.
    padded = len(written[0]) if written[0].startswith("0") and len(written[0]) > 1 else 0
    block = (*skeleton[:-1], str(absent).zfill(padded))
    common = set.intersection(*blocks.values())
    evidence = f"blocks {numbers[0]} to {numbers[-1]} are there, except {absent}"
    return {block + module: evidence for module in sorted(common)}


def _skeleton(path: Place) -> Place:
    """The path with every number replaced by ``#``."""
    return tuple("#" if part.isdecimal() else part for part in path)


def _spell(path: Place, spelling: Mapping[Place, str]) -> str:
    """The name of a path, joined by the dots and underscores of a name that differs only in its numbers."""
    joints = re.findall(r"[._]", spelling[_skeleton(path)])
    return "".join(part + joint for part, joint in zip(path, [*joints, ""], strict=True))


SWAPPED_MOST = 0.8  # the share of modules that must look exchanged; of published adapters it is a third at most
LONGER = 10  # B of no published adapter is so many times as long as its A: it is at most three times as long
SWAPPED_FEWEST = 4  # with fewer modules, all of them may look exchanged by chance
APART = 1.5  # to judge one module alone, A of all others must be longer than B of any of them by this factor
NEAR = 0.9  # and the suspected B must have at least this share of the length of the shortest A
ORTHOGONAL = 2e-3  # |cosine| of singular vectors: factors from an SVD show nothing of their initialisation
RANDOM = (True, "gaussian", "default", None)  # init_lora_weights under which A is random and B is zero
EXCHANGE = "exchange lora_A and lora_B of these modules, each transposed, or save the adapter again from its training"


class _Traces(NamedTuple):
    """Traces of the initialisation in a trained pair."""

    A: float  # mean length of the rows of A
    B: float  # mean length of the columns of B
    even: bool  # whether B reaches all outputs more evenly than A the inputs
    equal: bool  # whether the columns of B are more equal in length than the rows of A

    @property
    def exchanged(self) -> bool:
        """Whether B looks like a random A: longer, and either more even over its side or much longer."""
        return self.B > self.A and (self.even or self.B > LONGER * self.A)


def find_swapped_factors(exam: Examination) -> Iterator[Diagnosis]:
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
    if len(starts) < SWAPPED_FEWEST:
        return
    if (count := sum(start.exchanged for start in starts.values())) >= SWAPPED_MOST * len(starts):
        evidence = (
            f"in {share(count, len(starts))} the columns of B are longer than the rows of A, and reach all outputs "
            f"more evenly than A the inputs, or are more than {LONGER} times as long, as only a random A is"
        )
        yield Diagnosis("warning", "factors-swapped", evidence, EXCHANGE)
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
            yield Diagnosis("warning", "factors-swapped", evidence, EXCHANGE, name)


def _by_shape(exam: Examination) -> list[str]:
    """Modules whose factors were exchanged without transposing: the update is r × r, and its rank is above r."""
    # At r = 1 the exchanged pair would be a number, which no weight is.
    rank = exam.setting("r")
    modules: Mapping[str, ModuleReading] = exam.readings
    if not isinstance(rank, int) or exam.adapter.format != "peft" or rank < 2:
        return []
    return [name for name, one in modules.items() if one.module.shape == (rank, rank) and one.module.rank > rank]


def _traces(reading: ModuleReading) -> _Traces | None:
    """The traces of the initialisation; None for factors that have none, and for embeddings, where A starts at 0."""
    B, A, module = reading.B, reading.A, reading.module
    if not B or not A or not isinstance(module, LowRank) or module.rank < 2:
        return None
    if module.layout.kind in ("embedding", "merged") or max(B.skew, A.skew) < ORTHOGONAL:
        return None
    lengths = _mean(A.lengths), _mean(B.lengths)
    equal = relative_deviation(B.lengths) < relative_deviation(A.lengths)
    return _Traces(*lengths, even=B.unevenness < A.unevenness, equal=equal)


def _mean(values: Array) -> float:
    return float(np.add.reduce(values) / values.size)  # as `mean`, which takes longer than the sum of few numbers
