"""The rank of every adapted layer: that of the run, that of a glob, or the largest that its matrix allows."""

from collections import Counter
from collections.abc import Mapping, Sequence

from loralens.core.messages import note
from loralens.core.names import kind, some
from loralens.core.naming.selection import matches, select
from loralens.errors import OptionError
from loralens.training.number import as_int


def check_rank(rank: object, name: str = "rank") -> int:
    """A rank as a number of Python.

    Raises
    ------
    OptionError
        It is not a whole number of 1 or more.
    """
    number = as_int(rank)
    if number is None or number < 1:
        raise OptionError(f"{name} {rank!r} is not a whole number of 1 or more", fix="give a rank of 1 or more")
    return number


def check_rank_pattern(pattern: object) -> dict[str, int]:
    """The ranks of globs, as numbers of Python.

    Raises
    ------
    OptionError
        It is not a mapping of strings to ranks.
    """
    if not isinstance(pattern, Mapping) or not all(isinstance(glob, str) for glob in pattern):
        what = f"rank_pattern {pattern!r} is not a mapping of globs to ranks"
        raise OptionError(what, fix='give globs and their ranks: {"down_proj": 4}')
    return {glob: check_rank(rank, f"rank_pattern {glob!r}:") for glob, rank in pattern.items()}


def layer_ranks(sides: Mapping[str, int], *, rank: int, pattern: Mapping[str, int], say: bool = True) -> dict[str, int]:
    """The rank of every layer, at most the smaller side of its matrix; a note names the layers that have less.

    Parameters
    ----------
    sides : mapping of str to int
        The names of the layers, each with the smaller side of its matrix.
    rank : int
        The rank of layers that no glob matches.
    pattern : mapping of str to int
        Globs with their ranks. Of several that match a layer, the last one counts.
    say : bool
        Whether to log the note.

    Raises
    ------
    OptionError
        A glob matches no layer; a rank is larger than every matrix allows.
    """
    for glob in pattern:
        select(sides, [glob], prefixes=False)  # which has the message for a glob that matches nothing
    wishes = {
        name: next((r for glob, r in reversed([*pattern.items()]) if matches(name, glob)), rank) for name in sides
    }
    # More directions than the smaller side has cannot exist, and PiSSA could not take them from W.
    ranks = {name: min(wishes[name], side) for name, side in sides.items()}
    narrow = [name for name in sides if ranks[name] < wishes[name]]
    # A rank that fits nowhere is a mistake, not a model with a few narrow layers.
    if len(narrow) == len(sides):
        name = max(narrow, key=lambda layer: sides[layer])
        raise OptionError(
            f"rank {wishes[name]} is larger than the matrix of any target allows: that of {name} allows {sides[name]}",
            fix=f"give a rank of at most {sides[name]}",
        )
    if narrow and say:
        note(_narrow_text(narrow, ranks))
    return ranks


def _narrow_text(narrow: Sequence[str], ranks: Mapping[str, int]) -> str:
    """Which layers are narrower than the rank, by kind and rank."""
    counts = Counter((kind(name), ranks[name]) for name in narrow)
    kind_texts = [
        f"{name} gets rank {rank}" + (f" ({n} of them)" if n > 1 else "") for (name, rank), n in counts.items()
    ]
    return f"some layers are narrower than the rank: {some(kind_texts)}"
