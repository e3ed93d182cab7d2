"""Module names: their block, their kind, their natural order, and globs over them.

A module name is the dotted path of a weight in the base model: ``model.layers.11.self_attn.q_proj``. One expert of a
stack has its number in brackets behind it: ``model.layers.0.mlp.experts.gate_up_proj[3]``.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple, Protocol, TypeVar

from loralens.core.clock import Clock
from loralens.errors import OptionError

_DIGITS = re.compile(r"([0-9]+)")
_NUMBER = re.compile(r"[0-9]{1,9}")
_EXPERT = re.compile(r"(?P<stack>.+)\[(?P<number>[0-9]{1,9})\]")
_EXPERT_ALONE = re.compile(r"(^|\.)experts\.\d+\.")
FEWER_GLOBS = "name kinds of modules, q_proj, or use fewer and shorter globs"
_WILD = {*"*?"}  # letters of a glob that stand for others


class Block(NamedTuple):
    """The repeated part of a model that a module belongs to: ``model.layers`` number 11."""

    stack: str
    number: int


class Expert(NamedTuple):
    """One expert of a stack: the name of the stack's weight, and which of its matrices this is."""

    stack: str
    number: int


def natural_key(name: str) -> str:
    """A sort key in which numbers count as numbers: block 2 comes before block 10.

    One string, a few letters longer than the name: a tuple of parts takes fifty times the memory of ``1.1.1.1…``.
    """
    return _DIGITS.sub(_number_key, name)


def _number_key(digits: re.Match[str]) -> str:
    """By length, then by digit (int() refuses more than 4300 digits), then by zeros before; a letter below all others
    ends each part, so that what is shorter comes first.
    """
    number = digits[0].lstrip("0")
    return f"\0{chr(1 + len(number))}{number}\0{digits[0]}\0"


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
    path, joint = _parts(weight_name(name))
    if joint == "_":
        inner = [i for i, part in enumerate(path[:-1]) if i and _NUMBER.fullmatch(part)]
        return joint.join(path[inner[-1] + 1 :] if inner else path[:-1])
    start = len(path) - 1
    while start and path[start].isdecimal():
        start -= 1
    alone = start == 0 and len(path) == 2
    return path[0] if alone and path[1].isdecimal() else joint.join(path[start:])


def kind_in_block(name: str) -> str:
    """The path of a module behind its last number, joined by underscores: ``self_attn_q_proj``, ``attn1_to_out_0``.

    Finer than `kind`, which is ``to_q`` for self-attention and for cross-attention alike, and the same whether a
    dialect joins names by dots or by underscores. Numbers that end the name belong to it where a block stands before
    them; behind no block they count the modules: the kind of ``w_018`` is ``w``.
    """
    path = re.split(r"[._]", weight_name(name))
    last = len(path)
    while last and _NUMBER.fullmatch(path[last - 1]):
        last -= 1
    inner = [i for i in range(last) if _NUMBER.fullmatch(path[i])]
    return "_".join(path[inner[-1] + 1 :] if inner else path[:last] or path)


def expert(name: str) -> Expert | None:
    """The stack and number of a module that is one expert of a stack; None for any other."""
    found = _EXPERT.fullmatch(name)
    return Expert(found["stack"], int(found["number"])) if found else None


def weight_name(name: str) -> str:
    """The name of the weight that a module adapts: the stack's, where the module is one expert of it."""
    found = expert(name)
    return found.stack if found else name


def _parts(name: str) -> tuple[list[str], str]:
    """A name taken apart at its dots; at its underscores where it has no dots but numbers, as kohya writes names."""
    path = name.split("_")
    if "." not in name and any(i and _NUMBER.fullmatch(part) for i, part in enumerate(path)):
        return path, "_"
    return name.split("."), "."


def is_expert_alone(name: str) -> bool:
    """Whether a module is that of one expert, in a model that keeps no stack: ``model.layers.0.mlp.experts.3.w1``."""
    return bool(_EXPERT_ALONE.search(name))


def select(names: Iterable[str], globs: str | Sequence[str]) -> list[str]:
    """The names that match any of ``globs``, or the one; all of them where no glob is given.

    A glob is held against the whole name and against the kind, so ``q_proj`` means ``*.q_proj``, and ``q_*`` all
    kinds that begin with q_. Brackets are literal, as expert numbers are written with them. One glob need not stand in
    a list.

    Raises
    ------
    OptionError
        A glob matches nothing; the message holds the nearest names.
    FormatError
        There are so many names and globs that it would take minutes.
    """
    names = list(names)
    globs = [globs] if isinstance(globs, str) else globs
    if not globs:
        return names
    called: dict[str, set[str]] = {}
    for name in names:
        called.setdefault(name, set()).add(name)
        called.setdefault(kind(name), set()).add(name)
    clock = Clock()
    hits = {glob: _hits(called, glob, clock) for glob in globs}
    for glob, hit in hits.items():
        if not hit:
            raise OptionError(f"no module matches {glob!r}", fix=f"the nearest names are {nearest(glob, names)}")
    chosen = set().union(*hits.values())
    return [name for name in names if name in chosen]


def _hits(called: Mapping[str, set[str]], glob: str, clock: Clock) -> set[str]:
    """The names that a glob matches, from whole names and kinds → names."""
    if not wild(glob):
        return called.get(glob, set())
    pattern = _plain_brackets(glob)
    hits: set[str] = set()
    for name, names in called.items():
        with clock.running(f"the glob {glob!r:.60}", fix=FEWER_GLOBS):
            if fnmatchcase(name, pattern):
                hits |= names
    return hits


def wild(glob: str) -> bool:
    """Whether a glob has letters that stand for others."""
    return bool(_WILD & {*glob})


def matches(name: str, glob: str) -> bool:
    """Whether a glob of `select` matches this name."""
    if not wild(glob):
        return glob in (name, kind(name))
    pattern = _plain_brackets(glob)
    return fnmatchcase(name, pattern) or fnmatchcase(kind(name), pattern)


def _plain_brackets(glob: str) -> str:
    """A glob for `fnmatch`, to which brackets would be sets of letters."""
    return glob.replace("[", "[[]")


def some(names: Iterable[str], count: int = 3) -> str:
    """In words: the first ``count`` names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more if names else "nothing"


class Named(Protocol):
    """A row of a table that is found by its name."""

    @property
    def name(self) -> str:
        """What the row is called."""
        ...


Row = TypeVar("Row", bound=Named)


def row_named(name: str, rows: Sequence[Row], what: str) -> Row:
    """The row of a table that has this name; ``what`` says what its rows are.

    Raises
    ------
    OptionError
        There is none.
    """
    for row in rows:
        if row.name == name:
            return row
    names = [row.name for row in rows]
    raise OptionError(
        f"{name!r} is no {what}", fix=f"choose one of {', '.join(names)}; nearest: {nearest(name, names, 1)}"
    )


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """The ``count`` names that look most like ``name``, in words for a message."""
    from difflib import get_close_matches  # only when something is wrong

    names = list(names)
    pool = sorted({*names, *map(kind, names)}, key=natural_key)
    close = get_close_matches(name, pool, n=count, cutoff=0.0)
    return ", ".join(close) if close else "none: there are no modules"
