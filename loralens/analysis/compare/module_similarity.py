"""The similarity of two updates of one weight, and of many such pairs at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any, NamedTuple, Self, final

import numpy as np

from loralens.analysis.compare.known_bases import KnownBases
from loralens.analysis.compare.pairwise import ALIKE
from loralens.choices import Of, Side
from loralens.core.lowrank import LowRank, same_numbers
from loralens.core.structured import Update
from loralens.linalg.basis import Basis, cross_products
from loralens.linalg.chance import cosine_spread
from loralens.linalg.factor import Floats
from loralens.linalg.measures import frobenius
from loralens.linalg.product import column_basis
from loralens.linalg.subspace import (
    FlatVector,
    Overlap,
    overlaps,
    phi_map,
    scale_to_unit,
    unit_energies,
    weighted_sums,
)


@final
@dataclass(frozen=True, slots=True)
class Similarity:
    """The similarity of two updates of one weight, ΔW₁ and ΔW₂.

    Attributes
    ----------
    other : str
        The name of the module in the second adapter.
    side : str
        The side of `overlap`.
    shape : tuple of int
        (out, in) of both.
    ranks : tuple of int
        Nominal ranks.
    directions : tuple of int
        The numerical ranks of ΔW₁ and ΔW₂; 0 where ΔW = 0.
    norms : tuple of float
        ‖ΔW₁‖_F and ‖ΔW₂‖_F.
    cosine : float
        ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖), in [−1, 1]; 0 if one of them is 0.
    overlaps : mapping of side to Overlap
        The overlap of the chosen directions, at most the leading ``phi_rank``: of both sides of the update, of the in
        side of A, or of the out side of B.
    spans : mapping of side to float
        φ(k1, k2) of all directions of ΔW, whichever directions were chosen. NaN if one of the updates is 0.
    cka, cka_chance : mapping of side to float
        Linear CKA of ΔW, and its mean for random directions on that side; NaN if one of the updates is 0.
    initial : float
        Cosine of vec(A) over the rows that both have; NaN if there is no A, or it is 0.
    """

    other: str
    side: Side
    shape: tuple[int, int]
    ranks: tuple[int, int]
    directions: tuple[int, int]
    norms: tuple[float, float]
    cosine: float
    overlaps: Mapping[Side, Overlap]
    spans: Mapping[Side, float]
    cka: Mapping[Side, float]
    cka_chance: Mapping[Side, float]
    initial: float

    @property
    def overlap(self) -> Overlap:
        """The overlap on the chosen side."""
        return self.overlaps[self.side]

    @property
    def cosine_z(self) -> float:
        """`cosine` in standard deviations 1/√(out·in) of its null.

        Under the null both updates keep their singular values and have uniform (Haar) random directions on both sides.
        Its first two moments are known exactly (`loralens.linalg.chance`), so nothing is sampled.
        """
        return self.cosine / cosine_spread(self.shape)

    @property
    def zero(self) -> str:
        """Which of the two is 0, in words; empty if none is."""
        if all(self.norms):
            return ""
        first, second = (norm == 0 for norm in self.norms)
        return "both are 0" if first and second else "the first is 0" if first else "the second is 0" if second else ""


@final
@dataclass(frozen=True, slots=True)
class ComparedUpdate:
    """An update with its directions, and with everything that a comparison needs of it alone.

    Attributes
    ----------
    left, right : Basis
        The singular directions of ΔW.
    s : float64 array, shape (k,)
        Its singular values.
    factor : Basis or None
        The directions of A or B; None if those of ΔW are compared.
    norm : float
        ‖ΔW‖_F.
    strengths, energies : float64 arrays, shape (k,)
        The singular values and their squares, each as a vector of length 1.
    energy : float
        The sum of ``energies``.
    rows : int
        The number of rows of A; 0 if the update has no factors.
    sizes : tuple of pairs of int
        The shapes of the small matrices of all bases: updates of equal sizes are compared together.
    """

    update: Update
    left: Basis
    s: Floats
    right: Basis
    factor: Basis | None
    norm: float
    strengths: Floats
    energies: Floats
    energy: float
    rows: int
    sizes: tuple[tuple[int, ...], ...]
    _starts: dict[int, FlatVector] = field(default_factory=dict)

    @classmethod
    def of(cls, update: Update, of: Of, *, directions: KnownBases | None = None) -> Self:
        """The directions of an update, whose factors are read once.

        With ``directions``, which many comparisons share, the bases are in float64, as each is used many times.
        """
        update, (left, s, right) = (directions or KnownBases()).of(update)
        factor = None if of == "update" else column_basis(update.A.T if of == "A" else update.B)[0]
        if directions is not None:
            left, right, factor = left.cast(), right.cast(), factor and factor.cast()
        sizes = tuple(basis.T.shape for basis in (left, right, *([factor] if factor else [])))
        energies = unit_energies(s)
        return cls(
            update=update,
            left=left,
            s=s,
            right=right,
            factor=factor,
            norm=frobenius(s),
            strengths=scale_to_unit(s),
            energies=energies,
            energy=float(energies.sum()),
            rows=update.rank if isinstance(update, LowRank) else 0,
            sizes=sizes,
        )

    def start(self, rows: int) -> FlatVector:
        """The first rows of A as one vector."""
        if rows not in self._starts:
            self._starts[rows] = FlatVector.of(self.update.A[:rows])
        return self._starts[rows]


class ComparedPair(NamedTuple):
    """Two updates of one weight, and the name of the module in the second adapter."""

    first: ComparedUpdate
    second: ComparedUpdate
    other: str


def measure_similarities(pairs: Sequence[ComparedPair], side: Side, phi_rank: int | None) -> list[Similarity]:
    """The `Similarity` of every pair.

    Pairs with equal numbers of directions are computed together, which takes a fraction of the time. The bits of the
    result are those of each pair alone.
    """
    alike: dict[tuple[Any, Any], list[int]] = {}
    for p, pair in enumerate(pairs):
        alike.setdefault((pair.first.sizes, pair.second.sizes), []).append(p)
    found: dict[int, Similarity] = {}
    for ids in alike.values():
        found |= zip(ids, _measure_alike([pairs[p] for p in ids], side, phi_rank), strict=True)
    return [found[p] for p in range(len(pairs))]


def _measure_alike(pairs: Sequence[ComparedPair], side: Side, phi_rank: int | None) -> list[Similarity]:
    """The `Similarity` of pairs whose bases have the same numbers of columns."""
    a, b = [pair.first for pair in pairs], [pair.second for pair in pairs]
    # Two small matrices of inner products for each pair, from which all other numbers follow.
    crosses: dict[Side, Floats] = {
        "in": cross_products([one.right for one in a], [one.right for one in b]),
        "out": cross_products([one.left for one in a], [one.left for one in b]),
    }
    compared: dict[Side, list[Overlap]]
    if a[0].factor:
        factors = [one.factor for one in a if one.factor], [one.factor for one in b if one.factor]
        compared = {side: _leading(*factors, cross_products(*factors), phi_rank)}
    else:
        compared = {
            "in": _leading([one.right for one in a], [one.right for one in b], crosses["in"], phi_rank),
            "out": _leading([one.left for one in a], [one.left for one in b], crosses["out"], phi_rank),
        }
    empty = not (a[0].s.size and b[0].s.size)  # an update of 0 has no directions
    spans, cka = ({one: np.full(len(pairs), nan) for one in crosses} for _ in range(2))
    cosines = np.zeros(len(pairs))
    if not empty:
        strengths, energies = (
            [np.stack([getattr(one, key) for one in side_of_pair]) for side_of_pair in (a, b)]
            for key in ("strengths", "energies")
        )
        spans = {one: phi_map(G)[:, -1, -1] for one, G in crosses.items()}
        cka = {one: np.clip(weighted_sums(energies[0], G * G, energies[1]), 0.0, 1.0) for one, G in crosses.items()}
        cosines = np.clip(weighted_sums(strengths[0], crosses["out"] * crosses["in"], strengths[1]), -1.0, 1.0)
    # As numbers of Python, which records hold; the conversion is quicker for all pairs at once.
    cosine, span_in, span_out, cka_in, cka_out = (
        values.tolist() for values in (cosines, spans["in"], spans["out"], cka["in"], cka["out"])
    )
    results = []
    for p, pair in enumerate(pairs):
        # The numbers of equal updates are known: exactly 1, where rounding would give nearly 1. Their factors are
        # compared only where the cosine does not rule equality out.
        if (empty or cosine[p] > ALIKE) and _are_equal(pair):
            results.append(_of_equal(pair, side, phi_rank))
            continue
        results.append(
            _similarity(
                pair,
                side,
                cosine=cosine[p],
                overlaps={one: values[p] for one, values in compared.items()},
                spans={"in": span_in[p], "out": span_out[p]},
                cka={"in": cka_in[p], "out": cka_out[p]},
                initial=_initial(pair),
            )
        )
    return results


def _are_equal(pair: ComparedPair) -> bool:
    first, second = pair.first.update, pair.second.update
    return isinstance(first, LowRank) and isinstance(second, LowRank) and same_numbers(first, second)


def _of_equal(pair: ComparedPair, side: Side, phi_rank: int | None) -> Similarity:
    """The `Similarity` of two equal updates."""
    a, first = pair.first, pair.first.update
    sizes: dict[Side, int] = {"in": first.shape[1], "out": first.shape[0]}
    k = a.s.size
    width = a.factor.k if a.factor else k
    width = width if phi_rank is None else min(width, phi_rank)
    return _similarity(
        pair,
        side,
        cosine=float(k > 0),
        overlaps={one: Overlap.of_one(width, n) for one, n in sizes.items() if one == side or not a.factor},
        spans=dict.fromkeys(sizes, 1.0 if k else nan),
        cka=dict.fromkeys(sizes, 1.0 if k else nan),
        initial=1.0 if first.A.any() else nan,
    )


def _similarity(
    pair: ComparedPair,
    side: Side,
    *,
    cosine: float,
    overlaps: Mapping[Side, Overlap],
    spans: Mapping[Side, float],
    cka: Mapping[Side, float],
    initial: float,
) -> Similarity:
    a, b = pair.first, pair.second
    out, in_ = a.update.shape
    # The mean of linear CKA for random directions, as `linear_cka_chance` has it.
    energy = a.energy * b.energy if a.s.size and b.s.size else nan
    return Similarity(
        other=pair.other,
        side=side,
        shape=a.update.shape,
        ranks=(a.update.rank, b.update.rank),
        directions=(a.s.size, b.s.size),
        norms=(a.norm, b.norm),
        cosine=cosine,
        overlaps=overlaps,
        spans=spans,
        cka=cka,
        cka_chance={"in": energy / in_, "out": energy / out},
        initial=initial,
    )


def _leading(first: Sequence[Basis], second: Sequence[Basis], G: Floats, count: int | None) -> list[Overlap]:
    """The overlaps of at most the leading ``count`` directions of both."""
    if count is not None:
        first, second = ([basis.head(count) for basis in bases] for bases in (first, second))
    return overlaps(first, second, G[:, :count, :count])


def _initial(pair: ComparedPair) -> float:
    """Cosine of vec(A) over the rows that both have."""
    # Random numbers are drawn row by row, so the first rows of two ranks may be the same numbers.
    rows = min(pair.first.rows, pair.second.rows)
    return pair.first.start(rows).cosine(pair.second.start(rows)) if rows else nan
