"""Overlaps between the modules of one adapter that have the same width: which spans lie in which."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations_with_replacement
from math import nan
from typing import final

import numpy as np

from loralens.analysis.two_adapters import side_of
from loralens.choices import Of, Side
from loralens.core.adapter import Adapter
from loralens.core.names import block, kind, natural_key
from loralens.core.selection import select
from loralens.core.threads import Step, in_threads
from loralens.errors import place
from loralens.linalg.chance import overlap_spread, overlap_tail
from loralens.linalg.factor import Basis, Floats, Integers
from loralens.linalg.pairwise import pairwise_overlaps
from loralens.linalg.product import column_basis

# The usual level of a test, for the whole list: among thousands of pairs, a level for each would let dozens pass.
SURE = 0.05  # probability that chance alone produces any reported pair among the modules of one width


@final
@dataclass(frozen=True, slots=True)
class Nesting:
    """The overlaps of all M modules of one width with each other.

    Attributes
    ----------
    width : int
        The length n of their directions. Modules of one width may still act on different spaces: q_proj and k_proj of
        a block read the same vector, and o_proj reads another one of the same length.
    names : tuple of str
        Sorted by kind, then by block.
    directions : int64 array, shape (M,)
        The number of directions compared; 0 where ΔW = 0.
    first : float64 array, shape (M, M)
        φ(1, 1), the squared cosine of the strongest directions; NaN where ΔW = 0.
    full : float64 array, shape (M, M)
        φ(k, k′) of all directions compared: 1 where the smaller span lies in the larger; NaN where ΔW = 0.
    """

    width: int
    names: tuple[str, ...]
    directions: Integers
    first: Floats
    full: Floats

    @property
    def chance(self) -> Floats:
        """Mean of `full` between uniform random spans, max(k, k′)/n; NaN where ΔW = 0; float64, shape (M, M)."""
        larger = np.maximum.outer(self.directions, self.directions) / self.width
        return np.where(np.isnan(self.full), np.nan, larger)

    @property
    def z(self) -> Floats:
        """The z-score of `full` against chance, shape (M, M); NaN where chance allows only one value."""
        # Modules have few different numbers of directions, so the spreads of all pairs are a small table.
        widths = sorted(set(self.directions.tolist()))
        table = {(i, j): overlap_spread(i, j, self.width) for i in widths for j in widths}
        spread = np.array([[table[i, j] for j in self.directions.tolist()] for i in self.directions.tolist()])
        excess = self.full - self.chance
        return np.asarray(np.divide(excess, spread, out=np.full_like(excess, np.nan), where=spread > 0))


@final
@dataclass(frozen=True, slots=True)
class Relation:
    """The overlap of two kinds of one width, as means over pairs of modules; NaN if there is no such pair.

    Attributes
    ----------
    pairs : int
        The number of pairs of different modules that are not 0.
    chance : float
        Mean chance level of φ(k, k′).
    same, next, farther : float
        Mean φ(k, k′) of pairs within a block, in neighbouring blocks, and of all other pairs.
    first : float
        Mean φ(1, 1) of pairs within a block; of pairs in neighbouring blocks if both kinds are the same.
    """

    kinds: tuple[str, str]
    pairs: int
    chance: float
    same: float
    next: float
    farther: float
    first: float


def nesting(
    adapter: Adapter,
    *,
    of: Of = "update",
    side: Side | None = None,
    modules: Sequence[str] = (),
    phi_rank: int | None = None,
    threads: int = 1,
    step: Step | None = None,
) -> list[Nesting]:
    """Compare every module of an adapter with every other one of the same width; the largest group comes first.

    Parameters
    ----------
    adapter : Adapter
    of, side, modules, phi_rank, threads
        As in `similarity`.
    step : callable, optional
        Called with 1 after a module was read, and again after it was compared with all others.

    Raises
    ------
    OptionError
        A glob matches nothing, or A or B does not have this side.

    Notes
    -----
    The work is O(n (Σk)²) for all modules of width n, in blocked matrix products.
    """
    side = side_of(of, side)

    def directions(name: str) -> Basis:
        with place(name):
            module = adapter[name].load()
            if of != "update":
                return column_basis(module.A.T if of == "A" else module.B)[0].head(phi_rank or module.rank)
            U, s, V = module.bases()
            return (V if side == "in" else U).head(phi_rank or s.size)

    # By kind first: matrices of overlaps then show the kinds as blocks.
    names = sorted(select(adapter, modules), key=lambda name: (natural_key(kind(name)), natural_key(name)))
    bases = in_threads(directions, names, threads, step)
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(bases[name].n, []).append(name)
    nestings = [_nesting(width, {name: bases[name] for name in group}, step) for width, group in groups.items()]
    return sorted(nestings, key=lambda group: (-len(group.names), group.width))


def _nesting(width: int, bases: dict[str, Basis], step: Step | None) -> Nesting:
    widths = np.array([one.k for one in bases.values()], dtype=np.int64)
    smaller = np.minimum.outer(widths, widths).astype(np.float64)
    smaller[smaller == 0] = np.nan  # an update of 0 has no directions, so no overlap
    overlaps = []
    for count in (1, None):
        squares = pairwise_overlaps(
            [partial(Basis.columns, one) for one in bases.values()],
            width * int(widths.max()),
            head=count,
            step=None if count else step,  # reported once, for the larger of the two passes
        )
        overlaps.append(np.clip(squares / (smaller if count is None else np.minimum(smaller, count)), 0.0, 1.0))
    return Nesting(width, tuple(bases), widths, *overlaps)


def relations(nested: Nesting) -> list[Relation]:
    """The relation of every pair of kinds of a `Nesting`, in natural order."""
    kinds = np.array([kind(name) for name in nested.names])
    distances = _distances(nested.names)

    def mean(values: Floats) -> float:
        return float(values.mean()) if values.size else nan

    results = []
    for first, second in combinations_with_replacement(sorted(set(kinds.tolist()), key=natural_key), 2):
        pairs = np.outer(kinds == first, kinds == second) & ~np.isnan(nested.full)
        if first == second:  # each pair once, and no module with itself
            pairs = np.triu(pairs, 1)
        if not pairs.any():
            continue
        same, neighbours = pairs & (distances == 0), pairs & (distances == 1)
        results.append(
            Relation(
                kinds=(first, second),
                pairs=int(pairs.sum()),
                chance=mean(nested.chance[pairs]),
                same=mean(nested.full[same]),
                next=mean(nested.full[neighbours]),
                farther=mean(nested.full[pairs & ~(same | neighbours)]),
                # A block has one module of a kind, so two modules of one kind are in different blocks.
                first=mean(nested.first[neighbours if first == second else same]),
            )
        )
    return results


def closest(nested: Nesting, count: int = 10) -> list[tuple[int, int]]:
    """The pairs of modules with the most similar spans, as indices, by falling z-score.

    A pair is listed only if chance would produce an overlap as large in any of the pairs with a probability of at most
    5 %. The tail probability for the two numbers of directions is used instead of a limit on z. With single directions,
    one pair in 200 exceeds 5 standard deviations by chance.
    """
    rows, columns = np.triu_indices(len(nested.names), 1)
    z = np.nan_to_num(nested.z[rows, columns], nan=-np.inf)  # pairs without a z-score sort to the end
    pairs = [(int(rows[k]), int(columns[k])) for k in np.argsort(-z, kind="stable")[:count] if np.isfinite(z[k])]
    directions = nested.directions.tolist()
    return [
        (i, j)
        for i, j in pairs
        # Bonferroni's bound over all pairs that were looked at, because the pairs were chosen for their size.
        if rows.size * overlap_tail(float(nested.full[i, j]), directions[i], directions[j], nested.width) <= SURE
    ]


def _distances(names: Sequence[str]) -> Floats:
    """The distance in blocks of every two modules; NaN in different stacks and outside any block."""
    blocks = [block(name) for name in names]
    # A stack of its own for each module outside any block; no name holds a NUL.
    stacks = np.array([one.stack if one else f"\0{i}" for i, one in enumerate(blocks)])
    numbers = np.array([float(one.number) if one else np.nan for one in blocks])
    distances = np.abs(np.subtract.outer(numbers, numbers))
    return np.where(stacks[:, None] == stacks, distances, np.nan)
