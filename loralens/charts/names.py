"""Shortens names of modules, blocks and stacks so that they fit into a figure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, groupby, pairwise, takewhile

from loralens.core.names import Block, kind, natural_key

NAME = 28  # letters of a name next to a chart
SHORT = 16  # letters of a name where there is less room: in a title after the kind, or as a column
# Factors by which labels are thinned: round ones, so that the labels that stay are numbers that a reader expects.
STEPS = (1, 2, 4, 5, 8, 10, 20, 40, 50, 100, 200, 400, 500, 1000)

Column = Block | str | None  # a block; a module where an adapter has no blocks; None: outside any block


def fit_name(name: str, width: int = NAME) -> str:
    """Return a name on one line of at most ``width`` characters; '…' replaces the middle of a longer one."""
    # Names of files may hold bytes that are not UTF-8, which cannot be drawn: they become question marks.
    name = " ".join(name.encode("utf-8", "replace").decode().split())
    if len(name) <= width:
        return name
    # The middle, as the beginning says which block a module is in and the end which projection it is.
    tail = (width - 1) // 2
    return f"{name[: width - 1 - tail]}…{name[len(name) - tail :]}"


def block_order(block: Block) -> tuple[object, int]:
    """Return the sorting key of a block: stacks in natural order, then block numbers."""
    return natural_key(block.stack), block.number


def commonest_kinds(names: Iterable[str], most: int) -> list[str]:
    """Return the ``most`` kinds with the largest number of modules, in natural order."""
    counts = Counter(map(kind, names))
    # Ties are broken by name, so that the same adapter always gives the same figure.
    return sorted(sorted(counts, key=lambda k: (-counts[k], natural_key(k)))[:most], key=natural_key)


def stack_names(stacks: Iterable[str]) -> dict[str, str]:
    """Return stack → its short name, without the path that all stacks share; all short names differ."""
    paths = {stack: stack.split(".") for stack in stacks}
    # Without the last part, so that something of every name is left.
    levels = zip(*(path[:-1] for path in paths.values()), strict=False)
    common = len(list(takewhile(lambda level: len(set(level)) == 1, levels)))
    short = {stack: fit_name(".".join(path[common:])) for stack, path in paths.items()}
    return short if len(set(short.values())) == len(short) else _number_stacks(short)


def _number_stacks(names: Mapping[str, str]) -> dict[str, str]:
    """The names with a number before each, so that they still differ when they are shortened."""
    return {stack: f"({i}) {name}" for i, (stack, name) in enumerate(names.items(), start=1)}


def block_names(columns: Sequence[Column]) -> list[str]:
    """Return short names of columns, as in the title of a heat map; all of them differ."""
    stacks = stack_names(c.stack for c in columns if isinstance(c, Block))
    names = [fit_name(column_name(c, stacks, SHORT), SHORT) for c in columns]
    if len(set(names)) == len(names):
        return names
    return [fit_name(column_name(c, _number_stacks(stacks), SHORT), SHORT) for c in columns]


def column_name(column: Column, stacks: Mapping[str, str], width: int = NAME) -> str:
    """Return the name of a column: a block by its number, after the name of its stack where there are several stacks.

    Parameters
    ----------
    column : Block, str or None
    stacks : mapping of str to str
        Stack → its short name.
    width : int
        The number of letters to which the name of a module is shortened.
    """
    if not isinstance(column, Block):
        return fit_name(column or "outside", width)
    return f"{stacks[column.stack]}.{column.number}" if len(stacks) > 1 else str(column.number)


def stack_starts(columns: Sequence[Column]) -> list[int]:
    """Return the columns at which a stack of blocks, or the modules outside any block, begin."""
    groups = [list(group) for _, group in groupby(columns, lambda c: c.stack if isinstance(c, Block) else type(c))]
    return [0, *accumulate(map(len, groups[:-1]))] if groups else []


def stride(count: int, most: int) -> int:
    """Return the first of `STEPS` that thins ``count`` labels to at most ``most``, or the last where none does."""
    return next((step for step in STEPS if count <= step * most), STEPS[-1])


def columns_to_label(columns: Sequence[Column], most: int) -> list[int]:
    """Return about ``most`` columns to label: the first of every stack, and after it every second, fourth, fifth …"""
    count, firsts = len(columns), stack_starts(columns)
    step = stride(count, most)
    # Where there are more stacks than labels, stacks are thinned like blocks.
    if len(firsts) > most:
        return list(range(0, count, step))
    return [
        j
        for start, stop in pairwise([*firsts, count])
        for j in range(start, stop, step)
        # A label close before the next stack would touch the label of that stack.
        if j == start or stop == count or stop - j >= step
    ]
