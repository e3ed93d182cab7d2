"""Modules that are missing in one block although all other blocks have them."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination
from loralens.core.names import weight_name

CODES = {
    "module-missing": "A module is missing that all other blocks have: it was lost when the adapter was saved or "
    "converted, or it was left out on purpose."
}
FEWEST = 4  # with fewer blocks it is not clear that they form a grid
MOST = 0.1  # the share of blocks (at least one block) that may lack a module; if more lack it, that is the design
HOLES = 0.05  # the share of the grid that may be missing; a UNet's lowest block has no attention, a quarter of the grid
LONGEST = 9  # digits of a block number at most: a hostile file could have a gap of any length
DEEPEST = 64  # parts of a name at most: a hostile file could have names of any length
# What leads only to the next block, which the last one lacks: in SD3, Mochi, Swin and the two sides of a UNet.
TO_NEXT = re.compile(r"(^|[._])(to_add_out|ff_context|context_block|(down|up)sample(rs?)?)([._]|$)")
CHOSEN = ("layers_to_transform", "exclude_modules", "layer_replication")  # settings that leave modules out on purpose

Place = tuple[str, ...]


def look(exam: Examination) -> Iterator[Diagnosis]:
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
    last = {
        max((block for block in blocks if block[:-1] == of), key=_number) for of in {block[:-1] for block in blocks}
    }
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


def _number(block: Place) -> int:
    return int(block[-1]) if len(block[-1]) < LONGEST else -1


def _skeleton(path: Place) -> Place:
    """The path with every number replaced by ``#``."""
    return tuple("#" if part.isdecimal() else part for part in path)


def _spell(path: Place, spelling: Mapping[Place, str]) -> str:
    """The name of a path, joined by the dots and underscores of a name that differs only in its numbers."""
    joints = re.findall(r"[._]", spelling[_skeleton(path)])
    return "".join(part + joint for part, joint in zip(path, [*joints, ""], strict=True))
