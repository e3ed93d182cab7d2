"""Module names: their block, their kind, their natural order, and globs over them.

A module name is the dotted path of a weight in the base model: ``model.layers.11.self_attn.q_proj``. One expert of a
stack has its number in brackets behind it: ``model.layers.0.mlp.experts.gate_up_proj[3]``.
"""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from loralens.errors import OptionError

_DIGITS = re.compile(r"([0-9]+)")
_NUMBER = re.compile(r"[0-9]{1,9}")
_EXPERT = re.compile(r"\[\d+\]$")


class Block(NamedTuple):
    """The repeated part of a model that a module belongs to: ``model.layers`` number 11."""

    stack: str
    number: int


def natural_key(name: str) -> tuple[tuple[int, str, str], ...]:
    """A sort key in which numbers count as numbers: block 2 comes before block 10."""
    parts = _DIGITS.split(name)
    return tuple(_number_key(part) if i % 2 else (0, part, "") for i, part in enumerate(parts))


def _number_key(digits: str) -> tuple[int, str, str]:
    """By length, then by digit: int() refuses more than 4300 digits, and a name may have them."""
    number = digits.lstrip("0")
    return len(number), number, digits


def block(name: str) -> Block | None:
    """The block of a module: the path up to its first number, and that number; None outside any block."""
    path, joint = _parts(name)
    for i, part in enumerate(path):
        if (i or joint == ".") and _NUMBER.fullmatch(part):
            return Block(joint.join(path[:i]), int(part))
    return None


def kind(name: str) -> str:
    """The last part of a module name: ``q_proj``, ``to_out.0``, ``gate_up_proj`` of one expert of a stack.

    A number that ends the name belongs to the kind, unless it is the block's: the kind of ``w_018`` is ``w``.
    """
    path, joint = _parts(_EXPERT.sub("", name))
    if joint == "_":
        inner = [i for i, part in enumerate(path[:-1]) if i and _NUMBER.fullmatch(part)]
        return joint.join(path[inner[-1] + 1 :] if inner else path[:-1])
    start = len(path) - 1
    while start and path[start].isdecimal():
        start -= 1
    alone = start == 0 and len(path) == 2
    return path[0] if alone and path[1].isdecimal() else joint.join(path[start:])


def _parts(name: str) -> tuple[list[str], str]:
    """A name taken apart at its dots; at its underscores where it has no dots but numbers, as kohya writes names."""
    path = name.split("_")
    if "." not in name and any(i and _NUMBER.fullmatch(part) for i, part in enumerate(path)):
        return path, "_"
    return name.split("."), "."


def select(names: Iterable[str], globs: Sequence[str]) -> list[str]:
    """The names that match any of ``globs``; all of them where no glob is given.

    A glob that is a kind matches all modules of it, so ``q_proj`` means ``*.q_proj``. Brackets are literal, as expert
    numbers are written with them.

    Raises
    ------
    OptionError
        A glob matches nothing; the message holds the nearest names.
    """
    names = list(names)
    if not globs:
        return names
    hits = {glob: {name for name in names if _matches(name, glob)} for glob in globs}
    for glob, hit in hits.items():
        if not hit:
            raise OptionError(f"no module matches {glob!r}", fix=f"the nearest names are {nearest(glob, names)}")
    chosen = set().union(*hits.values())
    return [name for name in names if name in chosen]


def _matches(name: str, glob: str) -> bool:
    return glob == kind(name) or fnmatchcase(name, glob.replace("[", "[[]"))


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """The ``count`` names that look most like ``name``, in words for a message."""
    from difflib import get_close_matches  # only when something is wrong

    pool = sorted({*names, *map(kind, names)}, key=natural_key)
    close = get_close_matches(name, pool, n=count, cutoff=0.0)
    return ", ".join(close) if close else "none: there are no modules"
