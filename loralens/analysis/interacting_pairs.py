"""Interference between adapters of one base: energy in shared directions, and blocks where two updates oppose."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from math import log
from typing import final

import numpy as np

from loralens.analysis.every_pair import Module, Pairwise
from loralens.core.adapter import Adapter
from loralens.core.lazy import Array
from loralens.core.names import block, kind, natural_key
from loralens.core.threads import Step, in_threads
from loralens.errors import place
from loralens.linalg.factor import Floats
from loralens.linalg.measures import frobenius
from loralens.linalg.pairwise import Segments, outside_parts

FAR = 4.0  # smallest number of standard deviations from 0 at which a cosine does not count as chance
# At this |cosine| or a larger one, two updates of equal norm differ by at most 14 % of that norm: √(2 − 2·0.99).
SAME = 0.99
HALF = 0.7  # at this |cosine| or a larger one, at least half of the energy of each (0.7²) is along the other
# At this cosine or a lower one, the sum of two updates of equal norm has at most half of their energy: 1 + cosine.
CONFLICT = -0.5
# The doctor warns of the loss in a merge if it is larger than the same share.
LARGE = 0.2  # smallest |cosine| that matters: in the sum of two updates of equal norm, each loses or gains a fifth


def is_same(cosine: float) -> bool:
    """Whether two updates with this cosine are practically one adapter, up to its strength."""
    return cosine >= SAME


def in_words(cosine: float, z: float) -> str:
    """What two updates with this cosine do, as the end of a sentence about both.

    Parameters
    ----------
    cosine : float
        ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖) of the whole adapters.
    z : float
        The same in standard deviations of two random updates.
    """
    if is_same(cosine):
        return "are practically the same adapter"
    if cosine <= -SAME:
        return "are practically opposites: each takes back what the other does"
    # In small modules a large cosine may be an accident, so chance comes before all weaker words.
    if abs(z) < FAR:
        return "are no more alike than two random updates"
    if cosine >= HALF:
        return "do much the same"
    if cosine >= LARGE:
        return "agree in part"
    if cosine <= CONFLICT:
        return "conflict: their sum loses half of their energy or more"
    if cosine <= -LARGE:
        return "oppose each other in part"
    return "have little in common, though more than chance gives"


@final
@dataclass(frozen=True, slots=True)
class Interference:
    """The energy of every update, split by the directions of all other adapters; M modules, T adapters.

    U and V are the spans of the directions of all other adapters on the out and the in side; P_U and P_V project onto
    them.

    Attributes
    ----------
    modules : tuple of Module
    shared : float64 array, shape (M, T)
        ‖P_U ΔW P_V‖² / ‖ΔW‖², in [0, 1]: the share that the other adapters can change. NaN if ΔW is 0 or missing.
    private : float64 array, shape (M, T)
        ‖(1 − P_U) ΔW (1 − P_V)‖² / ‖ΔW‖². Energy that is neither shared nor private shares one side only.
    shared_chance, private_chance : float64 array, shape (M, T)
        Their means for random directions: d_U d_V/(out·in) and (1 − d_U/out)(1 − d_V/in), where d_U and d_V are the
        dimensions of the spans.
    """

    modules: tuple[Module, ...]
    shared: Floats
    private: Floats
    shared_chance: Floats
    private_chance: Floats


def interference(
    adapters: Sequence[Adapter],
    modules: Sequence[Module],
    *,
    threads: int = 1,
    step: Step | None = None,
) -> Interference:
    """The shared and the private energy of every adapter in every module of ``modules`` (those of a `Pairwise`).

    ``directions`` are those that `pairwise` has computed. ``step`` is called with 1 after every module.

    Raises
    ------
    FormatError
        A module holds NaN or Inf.

    Notes
    -----
    ΔW is never formed: on each side, one thin SVD of all directions side by side serves all adapters
    (`linalg.pairwise`). Directions of the others that differ by less than 1e-6 count as one. If the others have as many
    directions as the weight has dimensions, they span everything: the shared energy is 1, and so is its chance level.
    """
    result = Interference(tuple(modules), *np.full((4, len(modules), len(adapters)), np.nan))
    # Modules are identified by index, because one name may stand for modules of two shapes.
    in_threads(lambda m: _measure(m, result, adapters), range(len(modules)), threads, step)
    return result


def _measure(m: int, result: Interference, adapters: Sequence[Adapter]) -> None:
    """Fill row m of the result, at the adapters that have this module."""
    module = result.modules[m]
    updates = {t: adapters[t][name] for t, name in enumerate(module.holders) if name is not None}
    with place(module.name):
        bases = {t: update.load().bases() for t, update in updates.items()}
    out, in_ = module.shape
    outside_U = outside_parts(Segments.of([one.left.columns() for one in bases.values()]))
    outside_V = outside_parts(Segments.of([one.right.columns() for one in bases.values()]))
    for (t, (_, s, _)), (N_U, d_U), (N_V, d_V) in zip(bases.items(), outside_U, outside_V, strict=True):
        if not s.size:
            continue
        weights = np.outer(s, s) / frobenius(s) ** 2
        M_U, M_V = np.eye(s.size) - N_U, np.eye(s.size) - N_V  # M = UᵀPU is inside the span of the others, N outside
        result.shared[m, t] = np.clip((weights * M_U * M_V).sum(), 0.0, 1.0)  # tr(S M_U S M_V)/‖ΔW‖²
        result.private[m, t] = np.clip((weights * N_U * N_V).sum(), 0.0, 1.0)
        result.shared_chance[m, t] = d_U * d_V / (out * in_)
        result.private_chance[m, t] = (1 - d_U / out) * (1 - d_V / in_)


@final
@dataclass(frozen=True, slots=True)
class Interaction:
    """Contiguous modules in which two adapters agree, or oppose each other.

    Attributes
    ----------
    first, second : int
        The indices of the adapters.
    stack : str or None
        The stack of the blocks; None outside any block.
    blocks : tuple of int
        The first and the last of contiguous blocks; () outside any block.
    kinds : tuple of str
        The kinds of the modules; outside any block, their names.
    cosine : float
        ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖) over these modules together; negative if the adapters oppose each other.
    weight : float
        The contribution of these modules to the cosine of the whole updates.
    stacks : int
        The number of stacks of blocks in the collection; `location` names the stack if there are several.
    """

    first: int
    second: int
    stack: str | None
    blocks: tuple[int, ...]
    kinds: tuple[str, ...]
    modules: int
    cosine: float
    weight: float
    stacks: int = 1

    @property
    def location(self) -> str:
        """The place in words: ``blocks 12–18, v_proj``; of several stacks ``blocks 2–3 of encoder.layers, v_proj``."""
        kinds = ", ".join(self.kinds)
        if not self.blocks:
            return kinds
        start, stop = self.blocks
        blocks = f"block {start}" if start == stop else f"blocks {start}–{stop}"
        return f"{blocks} of {self.stack}, {kinds}" if self.stacks > 1 and self.stack else f"{blocks}, {kinds}"


def far_cosine(pairs: Pairwise) -> float:
    """The standard deviations from which a cosine in this collection is not chance: ln(cosines), at least `FAR`.

    The cosines of updates of rank 1 have exponential tails, so fewer than one of n cosines exceeds ln n by chance.
    """
    # Without the diagonals, which are 1, and each pair of the symmetric matrices once.
    cosines = np.count_nonzero(~np.isnan(pairs.cosines)) - np.count_nonzero(pairs.norms)
    return max(FAR, log(max(int(cosines) // 2, 1)))


def find_interactions(pairs: Pairwise, *, opposing: bool) -> list[Interaction]:
    """The contiguous blocks of a kind in which two adapters oppose each other (``opposing``) or agree.

    A module counts if its cosine has the right sign, is at least `far_cosine` standard deviations from 0, and is at
    least `LARGE`. Kinds with the same blocks are joined. Results are sorted by their contribution to the whole updates.
    """
    values = -pairs.cosines if opposing else pairs.cosines
    with np.errstate(invalid="ignore"):  # NaN, where an update is 0 or missing, does not count
        hits = (values >= LARGE) & (values >= far_cosine(pairs) * pairs.spreads[:, None, None])
    stacks = len({place.stack for module in pairs.modules if (place := block(module.name))})
    results = []
    # Most pairs have no module that counts, and need no look at their blocks.
    for s, t in np.argwhere(np.triu(hits.any(axis=0), 1)).tolist():
        common = np.asarray((pairs.ranks[:, [s, t]] > 0).all(axis=1))
        for rows in _contiguous_rows(pairs.modules, hits[:, s, t], common):
            names = [pairs.modules[row].name for row in rows]
            # Relative to the largest norm of each adapter, no square underflows or overflows.
            norms = pairs.norms[:, [s, t]] / pairs.norms[:, [s, t]].max(axis=0)
            inner = float((pairs.cosines[rows, s, t] * norms[rows].prod(axis=1)).sum())
            part, all_norms = (float(np.sqrt((norms[chosen] ** 2).sum(axis=0)).prod()) for chosen in (rows, common))
            places = [place for name in names if (place := block(name))]
            blocks = [place.number for place in places]
            results.append(
                Interaction(
                    first=s,
                    second=t,
                    stack=places[0].stack if places else None,
                    blocks=(min(blocks), max(blocks)) if blocks else (),
                    kinds=tuple(dict.fromkeys(map(kind, names) if places else names)),
                    modules=len(rows),
                    cosine=min(max(inner / part, -1.0), 1.0),  # rounding may exceed the bounds
                    weight=min(max(inner / all_norms, -1.0), 1.0),
                    stacks=stacks,
                )
            )
    return sorted(results, key=lambda interaction: -abs(interaction.weight))


def _contiguous_rows(modules: Sequence[Module], hit: Array, common: Array) -> Iterator[list[int]]:
    """The modules that count, grouped by contiguous blocks; kinds that cover the same blocks are joined."""
    by_kind: dict[tuple[str, str], dict[int, list[int]]] = {}
    for row in np.flatnonzero(common).tolist():
        name = modules[row].name
        if place := block(name):
            numbers = by_kind.setdefault((place.stack, kind(name)), {})
            # A block without a hit stays in the list, because it ends a run of contiguous blocks.
            numbers.setdefault(place.number, []).extend([row] if hit[row] else [])
        elif hit[row]:
            yield [row]
    joined: dict[tuple[str, int, int], list[int]] = {}
    for (stack, _), numbers in sorted(by_kind.items(), key=lambda item: natural_key(".".join(item[0]))):
        for has_hits, blocks in groupby(sorted(numbers.items()), key=lambda item: bool(item[1])):
            if has_hits:
                run = dict(blocks)
                joined.setdefault((stack, min(run), max(run)), []).extend(chain.from_iterable(run.values()))
    yield from joined.values()
