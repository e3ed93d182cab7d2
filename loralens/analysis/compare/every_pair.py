"""The full comparison of every pair of many adapters, in the order of the pairs, within a limit of memory."""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import TypeVar

from loralens.analysis.compare.known_bases import KnownBases
from loralens.analysis.compare.module_similarity import ComparedPair, ComparedUpdate, Similarity, measure_similarities
from loralens.analysis.compare.pairwise import Module
from loralens.choices import Of, Side
from loralens.core.adapter import Adapter
from loralens.errors import place
from loralens.linalg.pairwise import index_blocks

Kept = TypeVar("Kept")
Pair = tuple[int, int]

# The directions of an adapter are computed once for every block of pairs, so larger blocks save time.
HELD = 1 << 21  # numbers of the pairs in a block: about 45 MB where the caller keeps them as JSON
FEW_NUMBERS = 50  # numbers that a module of a pair has besides its angles and its map φ(i, j)
LOADED = 1 << 21  # numbers of the directions in a tile: 16 MiB; two tiles are held at a time
TOGETHER = 256  # most pairs that are computed together: more save no time, and take more memory
PRODUCTS = 1 << 17  # numbers of the maps of these pairs: 1 MiB, of which about eight are held


def compare_every_pair(
    adapters: Sequence[Adapter],
    modules: Sequence[Module],
    *,
    of: Of,
    side: Side,
    phi_rank: int | None,
    maps: bool,
    directions: KnownBases,
    keep: Callable[[str, Similarity], Kept],
) -> Iterator[tuple[int, int, list[Kept]]]:
    """Compare every adapter with every later one, module by module, as `compare_subspaces` compares two alone.

    Parameters
    ----------
    adapters : sequence of Adapter
    modules : sequence of Module
        The modules of a `Pairwise` of these adapters, which has found that they can be compared.
    of, side, phi_rank
        As for `compare_subspaces`.
    maps : bool
        Whether ``keep`` returns the map φ(i, j) of a module; this decides how many pairs are held at a time.
    directions : KnownBases
        The directions that are known already.
    keep : callable
        The name of a module in the first adapter, and its `Similarity` → what is yielded of it. Only this is held.

    Yields
    ------
    (int, int, list)
        The indices of two adapters, and what was kept of the modules that both have, in the order of the first.

    Notes
    -----
    Within a block of pairs, modules come one after the other, and the directions of every adapter are computed once.
    """
    pairs = list(combinations(range(len(adapters)), 2))
    # Position of every module in the order of every adapter that has it.
    positions = [{name: i for i, name in enumerate(adapter)} for adapter in adapters]
    widths = [
        max((adapter[holder].rank for module in modules if (holder := module.holders[t])), default=0)
        for t, adapter in enumerate(adapters)
    ]
    sizes = [len(modules) * (FEW_NUMBERS + _numbers(widths[s], widths[t], maps=maps)) for s, t in pairs]
    for block in index_blocks(sizes, HELD):
        kept: dict[Pair, dict[int, Kept]] = {pairs[i]: {} for i in block}
        for module in modules:
            names = {t: name for t, name in enumerate(module.holders) if name is not None}
            chosen = [pair for pair in kept if pair[0] in names and pair[1] in names]
            for pair, similarity in _compare(adapters, names, chosen, of, side, phi_rank, directions):
                name = names[pair[0]]
                kept[pair][positions[pair[0]][name]] = keep(name, similarity)
        for (s, t), by_position in kept.items():
            yield s, t, [by_position[i] for i in sorted(by_position)]


def _numbers(first: int, second: int, *, maps: bool) -> int:
    """About how many numbers a pair of modules of these ranks has: the angles, and φ with its chance level."""
    return min(first, second) + (2 * first * second if maps else 0)


def _load(
    adapters: Sequence[Adapter], names: dict[int, str], ids: Sequence[int], of: Of, directions: KnownBases
) -> dict[int, ComparedUpdate]:
    """The directions of one module in these adapters; ``names`` has its name in each of them."""
    compared = {}
    for t in ids:
        with place(names[t]):
            compared[t] = ComparedUpdate.of(adapters[t][names[t]], of, directions=directions)
    return compared


def _compare(
    adapters: Sequence[Adapter],
    names: dict[int, str],
    pairs: Sequence[Pair],
    of: Of,
    side: Side,
    phi_rank: int | None,
    directions: KnownBases,
) -> Iterator[tuple[Pair, Similarity]]:
    """Compare one module in these pairs; ``names`` has its name in every adapter that has it."""
    ids = sorted({t for pair in pairs for t in pair})
    # Both tall factors of an update, and its A as one vector.
    sizes = [2 * adapters[t][names[t]].rank * sum(adapters[t][names[t]].shape) for t in ids]
    groups = [[ids[i] for i in block] for block in index_blocks(sizes, LOADED)]
    group_of = {t: g for g, group in enumerate(groups) for t in group}
    pairs_of_tile: dict[Pair, list[Pair]] = {}
    for s, t in pairs:
        pairs_of_tile.setdefault((group_of[s], group_of[t]), []).append((s, t))
    ranks = {t: adapters[t][names[t]].rank for t in ids}
    for g, group in enumerate(groups):
        if not any(first == g for first, _ in pairs_of_tile):
            continue
        rows = _load(adapters, names, group, of, directions)
        for h in range(g, len(groups)):
            tile = pairs_of_tile.get((g, h), [])
            if tile:
                columns = rows if h == g else _load(adapters, names, groups[h], of, directions)
            # Each pair counts as a part of the limit, whatever its ranks are.
            for part in index_blocks([max(ranks[s] * ranks[t], PRODUCTS // TOGETHER) for s, t in tile], PRODUCTS):
                together = [tile[i] for i in part]
                compared = [ComparedPair(rows[s], columns[t], names[t]) for s, t in together]
                yield from zip(together, measure_similarities(compared, side, phi_rank), strict=True)
