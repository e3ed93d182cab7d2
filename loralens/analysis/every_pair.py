"""All pairs of adapters of a collection: cosines, overlaps of subspaces, groups, and every pair module by module."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, final

import numpy as np

from loralens.analysis.two_adapters import (
    SAME_START,
    ComparedUpdate,
    Similarity,
    measure_similarity,
)
from loralens.choices import Of, Side
from loralens.core.adapter import Adapter
from loralens.core.lowrank import LowRank
from loralens.core.names import natural_key
from loralens.core.selection import select
from loralens.core.structured import Update
from loralens.core.threads import Step, in_threads
from loralens.core.together import check_same_rows, match_names
from loralens.errors import MismatchError, OptionError, place
from loralens.linalg.chance import cosine_spread
from loralens.linalg.factor import Floats, Integers
from loralens.linalg.measures import frobenius
from loralens.linalg.pairwise import (
    join_pairs,
    pairwise_cosines,
    pairwise_overlaps,
    pairwise_products,
)
from loralens.linalg.product import column_basis


@final
@dataclass(frozen=True, slots=True)
class Module:
    """A module of the collection.

    Attributes
    ----------
    name : str
        Its name in the first adapter that has it.
    shape : tuple of int
        (out, in). The same name with another shape is another module.
    holders : tuple of str or None
        Its name in each adapter; None if the adapter lacks it.
    """

    name: str
    shape: tuple[int, int]
    holders: tuple[str | None, ...]


@final
@dataclass(frozen=True, slots=True)
class Pairwise:
    """T adapters in pairs, module by module; M modules that at least two of them have.

    Attributes
    ----------
    modules : tuple of Module
    norms : float64 array, shape (M, T)
        ‖ΔW‖_F; 0 if an adapter lacks the module.
    cosines : float64 array, shape (M, T, T)
        ⟨ΔW_s, ΔW_t⟩ / (‖ΔW_s‖‖ΔW_t‖); NaN if one of the two is 0 or missing.
    overlaps : mapping of side to float64 array, shape (M, T, T)
        φ(k_s, k_t) of all compared directions, in [0, 1]; NaN as above.
    directions : int64 array, shape (M, T)
        The number of directions that φ compares.
    initial : float64 array, shape (M, T, T)
        Cosine of vec(A) over the first min(r_s, r_t) rows; NaN if there is no A.
    ranks : int64 array, shape (M, T)
        Nominal ranks; 0 if an adapter lacks the module.
    """

    modules: tuple[Module, ...]
    norms: Floats
    cosines: Floats
    overlaps: Mapping[Side, Floats]
    directions: Integers
    initial: Floats
    ranks: Integers

    @property
    def count(self) -> int:
        """The number T of adapters."""
        return int(self.norms.shape[1])

    @property
    def spreads(self) -> Floats:
        """Standard deviation 1/√(out·in) of each module's cosine under chance, shape (M,)."""
        return np.array([cosine_spread(module.shape) for module in self.modules])

    @property
    def chances(self) -> dict[Side, Floats]:
        """Mean of φ under chance, max(k_s, k_t)/n, each shape (M, T, T); NaN if one of the two has no directions."""
        counts = np.where(self.directions > 0, self.directions, np.nan)
        larger = np.maximum(counts[:, :, None], counts[:, None, :])
        shapes = np.array([module.shape for module in self.modules])
        return {side: larger / shapes[:, int(side == "in"), None, None] for side in self.overlaps}

    @property
    def common(self) -> Integers:
        """The number of modules that each pair has in common, shape (T, T)."""
        present = (self.ranks > 0).astype(np.int64)
        return present.T @ present

    @property
    def cosine(self) -> Floats:
        """Cosine of the whole updates over their common modules, shape (T, T), in [−1, 1]; NaN if one is 0."""
        weights = self._weights()
        inner = np.einsum("mst,mst->st", np.nan_to_num(self.cosines), weights)
        return np.asarray(np.clip(np.where(weights.any(axis=0), inner, np.nan), -1.0, 1.0), dtype=np.float64)

    @property
    def cosine_z(self) -> Floats:
        """`cosine` in standard deviations of its null, shape (T, T).

        Under the null the norms stay and the directions are random in every module. Its variance is
        Σ_m ‖ΔW_s,m‖²‖ΔW_t,m‖²/(out·in) over Σ‖ΔW_s,m‖² Σ‖ΔW_t,m‖².
        """
        # Directions of different modules are independent, so the variances of the terms add up.
        spread = np.sqrt(np.einsum("mst,m->st", self._weights() ** 2, self.spreads**2))
        return np.asarray(np.where(spread > 0, self.cosine / np.where(spread > 0, spread, 1.0), np.nan), np.float64)

    def phi(self, side: Side) -> Floats:
        """Mean φ over the common modules that are 0 in neither adapter, shape (T, T); NaN if there is none."""
        return known_mean(self.overlaps[side])

    def chance(self, side: Side) -> Floats:
        """Mean chance level of φ over the same modules, shape (T, T)."""
        return known_mean(self.chances[side])

    @property
    def shared_initialisation(self) -> Floats:
        """Mean cosine of vec(A) over the common modules, shape (T, T).

        Near 1, both began from the same random A. Near 0, they did not, or A was re-factored afterwards. Random numbers
        are drawn row by row, so with different ranks only the first module can agree, and a small value means nothing.
        """
        return known_mean(self.initial)

    def _weights(self) -> Floats:
        """‖ΔW_s,m‖‖ΔW_t,m‖, relative to the norms of both updates over their common modules, shape (M, T, T)."""
        # Relative to the largest norm of each adapter, no square underflows or overflows.
        scaled = self.norms / np.where(self.norms.any(axis=0), self.norms.max(axis=0, initial=0.0), 1.0)
        both = (self.ranks[:, :, None] > 0) & (self.ranks[:, None, :] > 0)
        wholes = np.sqrt(np.einsum("ms,mst->st", scaled**2, both.astype(np.float64)))
        products = scaled[:, :, None] * scaled[:, None, :]
        norm_products = wholes * wholes.T
        return np.asarray(
            np.divide(products, norm_products, out=np.zeros_like(products), where=norm_products > 0), dtype=np.float64
        )


def pairwise(
    adapters: Sequence[Adapter],
    *,
    of: Of = "update",
    modules: Sequence[str] = (),
    phi_rank: int | None = None,
    labels: Sequence[str] = (),
    threads: int = 1,
    step: Step | None = None,
) -> Pairwise:
    """Compare every adapter with every other, module by module.

    Parameters
    ----------
    adapters : sequence of Adapter
        Two or more. Modules are matched by name, else by normal form. Each pair is compared on its common modules.
    of : str
        The directions that φ compares: those of the ``update`` ΔW on both sides, which do not depend on the gauge, or
        the singular vectors of ``A`` (in side, as in the LoRA paper) or of ``B`` (out side). Cosines are always of ΔW.
    modules : sequence of str
        Globs over module names or kinds; all where empty.
    phi_rank : int, optional
        The largest number of leading directions that φ compares.
    labels : sequence of str
        The names of the adapters in error messages; ``adapter 1`` and so on if empty.
        Keeps the directions that are computed here, for further comparisons.
    threads : int
        Modules worked on at a time.
    step : callable, optional
        Called with 1 after every module.

    Raises
    ------
    OptionError
        Fewer than two adapters, or a glob that matches nothing.
    MismatchError
        No two adapters have a module in common.
    FormatError
        A module holds NaN or Inf.

    Notes
    -----
    Blocked matrix products (`loralens.linalg.pairwise`) replace a loop over pairs. The work is O(M (out + in) (Σr)²),
    and only a few blocks of adapters of one module are in memory.
    """
    if len(adapters) < 2:
        raise OptionError("a comparison needs two adapters", fix="give two or more adapters")
    common = [one for one in match_collection(adapters) if sum(holder is not None for holder in one.holders) > 1]
    if not common:
        raise MismatchError("no two of these adapters have a module in common", fix="give adapters of one base model")
    chosen = set(select([one.name for one in common], modules))
    common = [one for one in common if one.name in chosen]
    for module in common:
        holders = zip(adapters, module.holders, strict=True)
        check_same_rows(module.name, tuple(adapter[holder] if holder else None for adapter, holder in holders))
    sides: tuple[Side, ...] = ("in", "out") if of == "update" else ("in",) if of == "A" else ("out",)
    shape = (len(common), len(adapters), len(adapters))
    result = Pairwise(
        modules=tuple(common),
        norms=np.zeros(shape[:2]),
        cosines=np.full(shape, np.nan),
        overlaps={side: np.full(shape, np.nan) for side in sides},
        directions=np.zeros(shape[:2], dtype=np.int64),
        initial=np.full(shape, np.nan),
        ranks=np.zeros(shape[:2], dtype=np.int64),
    )
    called = labels or [f"adapter {t}" for t in range(1, len(adapters) + 1)]

    # Modules are identified by index, because one name may stand for modules of two shapes.
    def measure(m: int) -> None:
        _measure(m, result, adapters, labels=called, of=of, head=phi_rank)

    in_threads(measure, range(len(common)), threads, step)
    return result


def match_collection(adapters: Sequence[Adapter]) -> list[Module]:
    """Match the modules of all adapters by name, else by normal form, and by shape; each is listed once."""
    modules: list[Module] = []
    # Each adapter is matched with the union of those before it, so that T adapters take T matches and not T²/2.
    for name, holders in sorted(match_names(adapters).items(), key=lambda item: natural_key(item[0])):
        shapes = [adapter[holder].shape if holder else None for holder, adapter in zip(holders, adapters, strict=True)]
        # Updates of two shapes cannot be compared: under one name they are two modules.
        for shape in dict.fromkeys(shape for shape in shapes if shape):
            fitting = (holder if own == shape else None for holder, own in zip(holders, shapes, strict=True))
            modules.append(Module(name, shape, tuple(fitting)))
    return modules


def known_mean(values: Floats) -> Floats:
    """Mean over the first axis without NaN; NaN where all values are NaN. `numpy.nanmean` would warn there."""
    finite = ~np.isnan(values)
    count = finite.sum(axis=0)
    total = np.where(finite, values, 0.0).sum(axis=0)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan), dtype=np.float64)


def _measure(
    m: int,
    result: Pairwise,
    adapters: Sequence[Adapter],
    *,
    labels: Sequence[str],
    of: Of,
    head: int | None,
) -> None:
    """Fill row m of the result, at the adapters that have this module; the others keep NaN and 0."""
    holders = {t: name for t, name in enumerate(result.modules[m].holders) if name is not None}
    ids = list(holders)
    updates = [adapters[t][name] for t, name in holders.items()]
    norms, counts = np.zeros(len(ids)), np.zeros(len(ids), dtype=np.int64)  # ‖ΔW‖, and directions that φ compares

    def triplets(i: int) -> tuple[Floats, Floats, Floats]:
        with place(labels[ids[i]]), place(holders[ids[i]]):
            U, s, V = updates[i].load().bases()
        norms[i], counts[i] = frobenius(s), s.size
        return U.columns(), s / norms[i] if s.size else s, V.columns()

    def factor_columns(i: int) -> Floats:
        with place(labels[ids[i]]), place(holders[ids[i]]):
            basis, s = column_basis(updates[i].A.T if of == "A" else updates[i].B)
        counts[i] = s.size
        return basis.columns()

    # Cosines are of ΔW whatever φ compares, so these products are needed for A and B too.
    size = max(min(one.rank, *one.shape) * sum(one.shape) for one in updates)
    inner, left, right = pairwise_products([partial(triplets, i) for i in range(len(ids))], size, head=head)
    overlaps: dict[Side, Floats] = {"in": right, "out": left}
    if of != "update":
        squares = pairwise_overlaps([partial(factor_columns, i) for i in range(len(ids))], size, head=head)
        overlaps = {"in" if of == "A" else "out": squares}
    initial = initial_cosines(updates)
    cosines = np.where(np.outer(norms, norms) > 0, np.clip(inner, -1.0, 1.0), np.nan)
    np.fill_diagonal(cosines, np.where(norms > 0, 1.0, np.nan))
    counts = counts if head is None else np.minimum(counts, head)
    result.norms[m, ids], result.ranks[m, ids] = norms, [update.rank for update in updates]
    at = np.ix_([m], ids, ids)
    result.cosines[at], result.initial[at] = cosines, initial
    # φ = Σcos²/min(k_s, k_t); NaN if one of the two has no directions.
    result.directions[m, ids] = counts
    smaller = np.where(np.outer(counts, counts) > 0, np.minimum.outer(counts, counts), np.nan)
    for side, squares in overlaps.items():
        result.overlaps[side][at] = np.clip(squares / smaller, 0.0, 1.0)


def initial_cosines(updates: Sequence[Update]) -> Floats:
    """Cosine of vec(A) of every pair over the rows that both have; NaN if there is no A, or it is 0."""
    cosines = np.full((len(updates), len(updates)), np.nan)
    ranks = [one.rank if isinstance(one, LowRank) else 0 for one in updates]
    for rank in sorted(set(ranks) - {0}):  # rising, so that each pair ends with the cosine at its smaller rank
        ids = [i for i, one in enumerate(ranks) if one >= rank]
        rows = [lambda update=updates[i], rank=rank: update.A[:rank].astype(np.float64) for i in ids]
        cosines[np.ix_(ids, ids)] = pairwise_cosines(rows, rank * updates[ids[0]].shape[1])
    return cosines


def connected_groups(similar: Floats, threshold: float = SAME_START) -> list[list[int]]:
    """The connected components of the graph of pairs with at least this similarity, as sorted indices."""
    labels = np.arange(len(similar))
    join_pairs(labels, *np.nonzero(np.nan_to_num(similar) >= threshold))  # NaN, nothing to compare, joins nothing
    return [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]


def cluster_order(cosine: Floats) -> tuple[Floats, list[int]]:
    """Average-linkage clustering of the adapters at distances 1 − |cosine|, and an order with similar ones together.

    The cosine is used instead of φ because it needs no choice of a rank, weights directions by their strength, has a
    chance level near 0, and is not raised by a shared initialisation. The absolute value is used because an update and
    its negative move the weights along the same direction.

    Returns
    -------
    float64 array, shape (T − 1, 4)
        The tree in the format of `scipy.cluster.hierarchy.linkage`.
    list of int
        The order of its leaves.
    """
    distance = 1 - np.abs(np.nan_to_num(cosine))
    np.fill_diagonal(distance, 0.0)  # the cosine of an adapter that is 0 with itself is NaN
    distance = (distance + distance.T) / 2  # symmetric to the last bit
    # The tree of a pair is known, and SciPy takes 0.3 s and 40 MiB to import.
    if len(distance) == 2:
        return np.array([[0.0, 1.0, distance[0, 1], 2.0]]), [0, 1]
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    # Unchecked, because rounding of equal adapters may leave distances of −1e-16.
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    return tree, [int(i) for i in leaves_list(tree)]


Kept = TypeVar("Kept")

HELD = 1 << 21  # numbers of the pairs that are held: about 45 MB where the caller keeps them as JSON
FEW_NUMBERS = 50  # numbers that a module of a pair has besides its angles and its map φ(i, j)


def compare_every_pair(
    adapters: Sequence[Adapter],
    modules: Sequence[Module],
    *,
    of: Of,
    side: Side,
    phi_rank: int | None,
    maps: bool,
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
    keep : callable
        The name of a module in the first adapter, and its `Similarity` → what is yielded of it. Only this is held.

    Yields
    ------
    (int, int, list)
        The indices of two adapters, and what was kept of the modules that both have, in the order of the first.

    Notes
    -----
    Modules come one after the other, for as many adapters at a time as `HELD` allows, each with all later ones.
    """
    count = len(adapters)
    widest = max(module.rank for adapter in adapters for module in adapter.modules.values())
    numbers = FEW_NUMBERS + widest + (2 * widest**2 if maps else 0)
    height = max(1, HELD // (len(modules) * count * numbers))
    for block in (range(count)[start : start + height] for start in range(0, count, height)):
        kept: dict[tuple[int, int], dict[str, Kept]] = {(s, t): {} for s in block for t in range(s + 1, count)}
        for module in modules:
            firsts: dict[int, tuple[str, ComparedUpdate]] = {}
            for t, name in enumerate(module.holders):
                if name is None or t < block[0]:
                    continue
                with place(name):
                    second = ComparedUpdate.of(adapters[t][name], of)
                for s, (own, first) in firsts.items():
                    similarity = measure_similarity(first, second, other=name, side=side, phi_rank=phi_rank)
                    kept[s, t][own] = keep(own, similarity)
                if t in block:
                    firsts[t] = name, second
        for (s, t), by_name in kept.items():
            yield s, t, [by_name[name] for name in adapters[s] if name in by_name]
