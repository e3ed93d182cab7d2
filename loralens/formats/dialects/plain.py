"""Files of plain pairs, as SAM-LoRA writes them: every key is ``w_a_000`` or ``w_b_000``.

The modules are called ``w_000`` … here, and the scale is 1. In SAM-LoRA, number N belongs to block N // 2 of the image
encoder: an even N is the query and an odd N the value, rows [0:d] and [2d:3d] of ``attn.qkv``. The file does not say
that it is one of SAM-LoRA.
"""

import re

from loralens.core.adapter import Adapter, Finding
from loralens.core.lowrank import Scaling
from loralens.formats.dialects.pairs import MISSING, Leaf, group, make_adapter, read_pair, unfold
from loralens.formats.files.container import Stored

NAME = "plain"

_HALF = re.compile(r"^w_(?P<half>[ab])_(?P<number>[0-9]+)$")


def plain_leaf(key: str) -> Leaf | None:
    """The module and the half that a key names; None for any other key."""
    half = _HALF.match(key)
    return Leaf(f"w_{half['number']}", half["half"].upper()) if half else None


def detect(stored: Stored) -> bool:
    """Whether a file is nothing but plain pairs."""
    return bool(stored.tensors) and all(plain_leaf(key) for key in stored.tensors)


def read(stored: Stored) -> Adapter:
    """The adapter of a file of plain pairs.

    Raises
    ------
    FormatError, ShapeError
        One half of a pair is missing, or factors do not fit together.
    """
    groups, _ = group(stored.tensors, plain_leaf)
    scaling = Scaling("given", origin=MISSING)
    modules = unfold(groups, lambda name, parts: [(name, read_pair(parts, NAME, lambda *_: scaling, conv=False))])
    text = "modules have numbers, not names; in SAM-LoRA they are query and value of the image encoder's blocks in turn"
    finding = Finding("note", "names-unknown", text, "merging needs the names of the weights that they belong to")
    return make_adapter(stored, NAME, modules, {}, [finding])
