"""Blocks of a model, by number or by name: which of them a text means, and which modules are in them.

The blocks of language models have numbers. Those of SD, SDXL and FLUX.1 have the names of
`loralens.core.naming.block_weights`, as numbers alone would say neither IN nor OUT.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from loralens.core.names import block
from loralens.errors import OptionError

BLOCK_FORMS = "give a number (3), a range (4-8), or the name of a block of an image model (IN04)"
# One block or a range of blocks: by number, or by the names that block weight tools use.
_NUMBERS = re.compile(r"(?P<first>[0-9]{1,9})(?:-(?P<last>[0-9]{1,9}))?")
_NAMED = re.compile(
    r"(?P<letters>BASE|CLIP|T5|IN|MID|OUT|D|S)(?P<first>[0-9]{1,2})?(?:-(?:IN|OUT|D|S)?(?P<last>[0-9]{1,2}))?"
)
_ORDER = ("BASE", "CLIP", "T5", "IN", "MID", "OUT", "D", "S")  # the order in which messages list blocks


def block_name(entry: str) -> str:
    """The name of a block in this project, which calls A1111's M00 MID."""
    return "MID" if entry.upper() == "M00" else entry


def is_block(entry: str) -> bool:
    """Whether a text is a block, or a range of blocks."""
    named = _NAMED.fullmatch(entry.upper())
    # A range needs a first number: IN-IN04 is not a range.
    return bool(_NUMBERS.fullmatch(entry)) or bool(named and (named["first"] or not named["last"]))


def inside_blocks(names: Sequence[str], blocks: str) -> set[str]:
    """The names in any of the blocks.

    Raises
    ------
    OptionError
        A block that no module is in, or numbers for a model whose blocks have names.
    """
    image = image_blocks(names)
    numbered = any(_number(own[0]) >= 0 for own in image.values())
    inside: set[str] = set()
    for entry in blocks.split(","):
        if numbered and entry[:1].isdigit():
            what = f"block {entry} does not exist: the blocks of an image model are chosen by name, not by number"
            raise OptionError(what, fix=f"give one of {_block_names(image)}, or a range of them")
        members = {name for name in names if in_block(entry, name, image.get(name, ()))}
        if not members:
            places = describe_blocks(names) if entry[:1].isdigit() else _block_names(image)
            raise OptionError(f"no module is in block {entry}", fix=f"the modules are in {places}")
        inside |= members
    return inside


def in_block(entry: str, name: str, image: Sequence[str]) -> bool:
    """Whether a module is in one block or range of blocks; ``image`` has the names of its block in an image model."""
    if numbers := _NUMBERS.fullmatch(entry):
        own = block(name)
        first, last = sorted((int(numbers["first"]), int(numbers["last"] or numbers["first"])))
        return own is not None and first <= own.number <= last
    parts = _NAMED.fullmatch(entry.upper())
    if not parts or not image:
        return False
    if parts["first"] is None:
        # IN alone is a block of FLUX, and all blocks IN00, IN01 … of a UNet.
        return any(_letters(own) == parts["letters"] for own in image)
    first, last = sorted((int(parts["first"]), int(parts["last"] or parts["first"])))
    return any(_letters(own) == parts["letters"] and first <= _number(own) <= last for own in image)


def _letters(own: str) -> str:
    """The name of a block without its number; T5 is a name, and the blocks MID0 to MID2 are layers of MID."""
    return own if own == "T5" else own.rstrip("0123456789")


def _number(own: str) -> int:
    """The number of a block; −1 if it has none."""
    return int(own[len(_letters(own)) :] or -1)


def image_blocks(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Module → the names of its block; empty unless the names of all modules are those of one image model."""
    # Imported here, because the tables of layers are long, and selecting modules seldom needs them.
    from loralens.core.naming.block_weights import layer_block_names
    from loralens.core.naming.image_models import image_models

    for model in image_models():
        layers = [model.layers_named(name) for name in names]
        if names and all(layers):
            return {name: layer_block_names(found[0]) for name, found in zip(names, layers, strict=True)}
    return {}


def _block_names(image: Mapping[str, Sequence[str]]) -> str:
    """The names of the blocks of these modules, in the order of the model; consecutive blocks are given as ranges."""
    if not image:
        return "no block that has a name; give numbers"
    present: dict[str, set[int]] = {}
    for own in image.values():
        # The widest name: MID and not its layers MID0 to MID2.
        name = own[-1] if own[-1] == "MID" else own[0]
        present.setdefault(_letters(name), set()).update(number for number in [_number(name)] if number >= 0)
    texts = []
    for letters in sorted(present, key=_ORDER.index):
        numbers = sorted(present[letters])
        texts += [f"{letters}{text}" for text in _ranges(numbers, f"-{letters}", width=2)] if numbers else [letters]
    return ", ".join(texts)


def describe_blocks(names: Iterable[str]) -> str:
    """The blocks that modules are in, as text for a message: ``the blocks 0-11 of model.layers``."""
    stacks: dict[str, set[int]] = {}
    for name in names:
        if own := block(name):
            stacks.setdefault(own.stack, set()).add(own.number)
    if not stacks:
        return "no block: their names have no numbers"
    texts = [f"the blocks {', '.join(_ranges(sorted(numbers)))} of {stack}" for stack, numbers in stacks.items()]
    return "; ".join(texts[:4])


def _ranges(numbers: Sequence[int], joint: str = "-", width: int = 1) -> list[str]:
    """Rising numbers as ranges: ``0-3``, ``7``."""
    starts = [numbers[0], *(second for first, second in pairwise(numbers) if second > first + 1)]
    ends = [*(first for first, second in pairwise(numbers) if second > first + 1), numbers[-1]]
    return [
        f"{first:0{width}}" if first == last else f"{first:0{width}}{joint}{last:0{width}}"
        for first, last in zip(starts, ends, strict=True)
    ]
