"""Modules that every other block has."""

import re
from collections.abc import Collection, Iterator, Mapping

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.patient import Patient
from loralens.core.names import weight_name

RULES = {
    "module-missing": "A module is missing that all other blocks have: it was lost when the adapter was saved or "
    "converted, or it was left out on purpose."
}
FEWEST = 4  # blocks below which a grid is not known to be one
MOST = 0.1  # of the blocks may lack a module, and one may; what more of them lack is a design
HOLES = 0.05  # of the grid may be missing: a UNet's lowest block has no attention at all, a quarter of the grid
LONGEST = 9  # digits of a block's number
DEEPEST = 64  # parts of a name, which a hostile file may have without end
CHOSEN = ("layers_to_transform", "exclude_modules", "layer_replication")  # settings that leave modules out on purpose

Place = tuple[str, ...]


def look(patient: Patient) -> Iterator[Diagnosis]:
    """One diagnosis for every hole in an otherwise full grid of blocks and modules."""
    if any(patient.setting(key) for key in CHOSEN):
        return
    names = dict.fromkeys(map(weight_name, patient.adapter))
    fix = "take it from the training's own checkpoint; nothing is wrong if it was left out on purpose"
    for name, evidence in missing_modules(names).items():
        yield Diagnosis("warning", "module-missing", evidence, fix, name)


def missing_modules(names: Collection[str]) -> dict[str, str]:
    """Names that would fill holes of a grid → how full it is otherwise.

    A name is taken apart at its dots and underscores, so that every dialect has the same grids. Each of its numbers
    makes a grid: the blocks are what stands before it with all numbers left open, the modules what stands behind it. A
    block is compared only where it has nothing that others lack, as the dense block of a mixture of experts has.
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
    return {_named(path, spelling): evidence for path, evidence in missing.items() if ".".join(path) not in present}


def _holes(blocks: Mapping[Place, set[Place]]) -> dict[Place, str]:
    """Modules that nearly all blocks have, in blocks that have no others instead; none where many are missing."""
    counts: dict[Place, int] = {}
    for modules in blocks.values():
        for module in modules:
            counts[module] = counts.get(module, 0) + 1
    few = max(1, int(MOST * len(blocks)))
    usual = {module for module, count in counts.items() if count >= len(blocks) - few}
    holes = [(block, module) for block, modules in blocks.items() if modules <= usual for module in usual - modules]
    if len(holes) > max(1, HOLES * len(usual) * len(blocks)):
        return {}
    return {
        block + module: f"{counts[module]} of {len(blocks)} blocks have {'_'.join(module)}, and this one has not"
        for block, module in sorted(holes)
    }


def _gap(skeleton: Place, blocks: Mapping[Place, set[Place]]) -> dict[Place, str]:
    """The one block that is missing between the first and the last, of a single row of blocks."""
    if skeleton.count("#") != 1:
        return {}
    written = sorted((block[-1] for block in blocks if len(block[-1]) < LONGEST), key=int)
    numbers = list(map(int, written))
    if not numbers or numbers[-1] - numbers[0] != len(numbers):
        return {}
    (absent,) = {*range(numbers[0], numbers[-1] + 1)} - {*numbers}
    padded = len(written[0]) if written[0].startswith("0") and len(written[0]) > 1 else 0
    block = (*skeleton[:-1], str(absent).zfill(padded))
    common = set.intersection(*blocks.values())
    evidence = f"blocks {numbers[0]} to {numbers[-1]} are there but {absent}"
    return {block + module: evidence for module in sorted(common)}


def _skeleton(path: Place) -> Place:
    """A path with its numbers left open."""
    return tuple("#" if part.isdecimal() else part for part in path)


def _named(path: Place, spelling: Mapping[Place, str]) -> str:
    """The name of a path, joined by dots and underscores as that of a neighbour with other numbers."""
    joints = re.findall(r"[._]", spelling[_skeleton(path)])
    return "".join(part + joint for part, joint in zip(path, [*joints, ""], strict=True))
