"""Where adapters of one base meet: energy that shares directions with the others, and modules in which two fight."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import log
from typing import Any, NamedTuple, final

import numpy as np

from loralens.analysis.compare.pairwise import Module, Pairwise
from loralens.core.adapter import Adapter
from loralens.core.lazy import Array
from loralens.core.names import Block, block, kind, natural_key
from loralens.core.threads import Step, in_threads
from loralens.errors import place
from loralens.linalg.factor import Floats
from loralens.linalg.measures import frobenius
from loralens.linalg.pairwise import Segments, outside

FAR = 4.0  # standard deviations from chance beyond which a cosine is no accident, of few
LARGE = 0.2  # and the cosine at least that it takes to matter: a sum of two of one length then loses a fifth of each


@final
@dataclass(frozen=True, slots=True)
class Interference:
    """The energy of every update, divided by the directions of all other adapters; M modules, T adapters.

    U and V are the spans of the others' directions on the out and the in side, P their projections.

    Attributes
    ----------
    modules : tuple of Module
    shared : float64 array, shape (M, T)
        ‖P_U ΔW P_V‖² / ‖ΔW‖², in [0, 1]: what a change of the others can reach. NaN where ΔW is 0 or not there.
    private : float64 array, shape (M, T)
        ‖(1 − P_U) ΔW (1 − P_V)‖² / ‖ΔW‖². What is neither shares one side only.
    shared_chance, private_chance : float64 array, shape (M, T)
        Their means for directions drawn anew: d_U d_V/(out·in) and (1 − d_U/out)(1 − d_V/in), d the dimensions of
        the spans.
    """

    modules: tuple[Module, ...]
    shared: Floats
    private: Floats
    shared_chance: Floats
    private_chance: Floats


def interference(
    adapters: Sequence[Adapter], modules: Sequence[Module], *, threads: int = 1, step: Step | None = None
) -> Interference:
    """Shared and private energy of every adapter in every module of ``modules`` (those of a `Pairwise`).

    ``step`` is called with 1 after every module.

    Raises
    ------
    FormatError
        A module holds NaN or Inf.

    Notes
    -----
    ΔW is never formed: one thin SVD a side of all directions side by side serves all adapters (`linalg.pairwise`).
    Directions of the others less than 1e-6 apart count as one. Where the others have as many directions as the
    weight has dimensions they span everything: the shared energy is 1, and so is its chance level.
    """
    keys = {f"{one.name} {one.shape}": one for one in modules}
    rows = list(in_threads(lambda key: _measure(keys[key], adapters), list(keys), threads, step).values())
    return Interference(tuple(modules), *np.moveaxis(np.array(rows).reshape(len(rows), len(adapters), 4), 2, 0))


def _measure(module: Module, adapters: Sequence[Adapter]) -> Floats:
    """The four numbers of every adapter in one module, float64, shape (T, 4)."""
    updates = {t: adapters[t][name] for t, name in enumerate(module.holders) if name is not None}
    numbers = np.full((len(adapters), 4), np.nan)
    with place(module.name):
        bases = {t: update.bases() for t, update in updates.items()}
    out, in_ = module.shape
    outside_U = outside(Segments.of([one.left.columns() for one in bases.values()]))
    outside_V = outside(Segments.of([one.right.columns() for one in bases.values()]))
    for (t, (_, s, _)), (N_U, d_U), (N_V, d_V) in zip(bases.items(), outside_U, outside_V, strict=True):
        if not s.size:
            continue
        weights = np.outer(s, s) / frobenius(s) ** 2
        M_U, M_V = np.eye(s.size) - N_U, np.eye(s.size) - N_V  # M = UᵀPU: inside the others' span, N outside
        numbers[t] = (
            np.clip((weights * M_U * M_V).sum(), 0.0, 1.0),  # tr(S M_U S M_V)/‖ΔW‖²
            np.clip((weights * N_U * N_V).sum(), 0.0, 1.0),
            d_U * d_V / (out * in_),
            (1 - d_U / out) * (1 - d_V / in_),
        )
    return numbers


@final
@dataclass(frozen=True, slots=True)
class Meeting:
    """A stretch of modules in which two adapters push the same way, or against each other.

    Attributes
    ----------
    first, second : int
        The adapters.
    stack : str or None
        Whose blocks are meant; None outside any block.
    blocks : tuple of int
        The first and the last of contiguous blocks; () outside any.
    kinds : tuple of str
        Kinds of module, or whole names outside any block.
    modules : int
    cosine : float
        ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖) over these modules together: negative where they fight.
    weight : float
        Their part of the cosine of the whole updates.
    stacks : int
        Stacks of blocks in the collection: of several `where` says which is meant.
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
    def where(self) -> str:
        """In words: ``blocks 12–18, v_proj``; of several stacks ``blocks 2–3 of encoder.layers, v_proj``."""
        kinds = ", ".join(self.kinds)
        if not self.blocks:
            return kinds
        start, stop = self.blocks
        blocks = f"block {start}" if start == stop else f"blocks {start}–{stop}"
        return f"{blocks} of {self.stack}, {kinds}" if self.stacks > 1 and self.stack else f"{blocks}, {kinds}"


def far(pairs: Pairwise) -> float:
    """Standard deviations from chance that a cosine of this collection needs: ln(cosines), `FAR` at least.

    Cosines of updates of one direction have exponential tails, so of n cosines less than one exceeds ln n by chance.
    """
    cosines = np.count_nonzero(~np.isnan(pairs.cosines)) - np.count_nonzero(pairs.norms)  # without the diagonals
    return max(FAR, log(max(int(cosines) // 2, 1)))


def meetings(pairs: Pairwise, *, fights: bool) -> list[Meeting]:
    """Where two adapters fight, or agree: contiguous blocks of a kind whose every cosine is far from chance and large.

    A module counts if its cosine has the sign asked for and is at least `far` standard deviations from 0, and at least
    `LARGE`. Kinds with the same blocks come together; what weighs most in the whole updates comes first.
    """
    sign = -1.0 if fights else 1.0
    values = sign * pairs.cosines
    with np.errstate(invalid="ignore"):
        hits = (values >= LARGE) & (values >= far(pairs) * pairs.spreads[:, None, None])
    stacks = len({home.stack for one in pairs.modules if (home := block(one.name))})
    results = [
        replace(_meeting(pairs, s, t, members), stacks=stacks)
        for s, t in combinations(range(pairs.count), 2)
        for members in _stretches(pairs, hits[:, s, t], np.all(pairs.ranks[:, [s, t]] > 0, axis=1))
    ]
    return sorted(results, key=lambda one: -abs(one.weight))


class _Seat(NamedTuple):
    """Where a module stands."""

    home: Block | None
    kind: str
    row: int


def _stretches(pairs: Pairwise, hit: Array, common: Any) -> Iterator[list[_Seat]]:
    """Modules that hit, gathered to contiguous blocks; kinds that cover the same blocks together."""
    seats = [
        _Seat(block(pairs.modules[m].name), kind(pairs.modules[m].name), m) for m in np.flatnonzero(common).tolist()
    ]
    rows: dict[tuple[str, str], dict[int, list[_Seat]]] = {}
    for seat in seats:
        if seat.home:
            rows.setdefault((seat.home.stack, seat.kind), {}).setdefault(seat.home.number, []).append(seat)
        elif hit[seat.row]:
            yield [seat]
    together: dict[tuple[str, int, int], list[_Seat]] = {}
    for (stack, _), blocks in sorted(rows.items(), key=lambda item: natural_key(".".join(item[0]))):
        run: list[_Seat] = []
        for number in [*sorted(blocks), None]:
            members = [seat for seat in blocks.get(number, []) if hit[seat.row]] if number is not None else []
            if members:
                run += members
            elif run:
                key = stack, _number(run[0]), _number(run[-1])
                together.setdefault(key, []).extend(run)
                run = []
    yield from together.values()


def _number(seat: _Seat) -> int:
    assert seat.home
    return seat.home.number


def _meeting(pairs: Pairwise, s: int, t: int, members: Sequence[_Seat]) -> Meeting:
    rows = [seat.row for seat in members]
    norms = pairs.norms[:, [s, t]] / pairs.norms[:, [s, t]].max(axis=0)
    inner = float((pairs.cosines[rows, s, t] * norms[rows].prod(axis=1)).sum())
    common = (pairs.ranks[:, [s, t]] > 0).all(axis=1)
    part, all_norms = (float(np.sqrt((norms[which] ** 2).sum(axis=0)).prod()) for which in (rows, common))
    home = members[0].home
    blocks = [_number(seat) for seat in members if seat.home]
    names = [seat.kind if home else pairs.modules[seat.row].name for seat in members]
    return Meeting(
        first=s,
        second=t,
        stack=home.stack if home else None,
        blocks=(min(blocks), max(blocks)) if blocks else (),
        kinds=tuple(dict.fromkeys(names)),
        modules=len(rows),
        cosine=min(max(inner / part, -1.0), 1.0),  # which rounding may leave
        weight=min(max(inner / all_norms, -1.0), 1.0),
    )
