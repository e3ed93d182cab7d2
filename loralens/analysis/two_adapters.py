"""Similarity of two adapters, module by module: φ(i, j), principal angles, cosine and CKA, with chance levels."""

from collections.abc import ItemsView, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt
from typing import Literal, Self, final

import numpy as np

from loralens.choices import Of, Side
from loralens.core.adapter import Adapter
from loralens.core.lowrank import LowRank
from loralens.core.matching import same_modules
from loralens.core.names import some
from loralens.core.selection import select
from loralens.core.structured import Update
from loralens.core.threads import Step, in_threads
from loralens.core.together import check_same_rows
from loralens.errors import MismatchError, OptionError, place
from loralens.linalg.chance import cosine_spread
from loralens.linalg.factor import Basis, Floats
from loralens.linalg.measures import frobenius
from loralens.linalg.product import column_basis
from loralens.linalg.subspace import Overlap, linear_cka, unit_energies, update_cosine, vector_cosine

# Independent initialisations have 0 ± 1/√(r·in). Among 497 published Mistral adapters, any threshold from 0.15 to 0.6
# gave the same groups, and adapters of different groups had at most 0.044.
SAME_START = 0.5  # smallest cosine of A that shows a common initialisation


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
    """An update with its factors in memory, its singular directions, and those of A or B if these are compared."""

    update: Update
    left: Basis
    s: Floats
    right: Basis
    factor: Basis | None
    energies: Floats

    @classmethod
    def of(cls, update: Update, of: Of) -> Self:
        """The directions of an update, whose factors are read once.

        With ``directions``, which many comparisons share, the bases are in float64, as each is used many times.
        """
        update = update.load()
        left, s, right = update.bases()
        factor = None if of == "update" else column_basis(update.A.T if of == "A" else update.B)[0].cast()
        return cls(update, left.cast(), s, right.cast(), factor, unit_energies(s))


def measure_similarity(
    a: ComparedUpdate, b: ComparedUpdate, *, other: str, side: Side, phi_rank: int | None
) -> Similarity:
    """The `Similarity` of two updates of one weight; ``other`` is the name of the module in the second adapter."""
    most = max(a.update.rank, b.update.rank) if phi_rank is None else phi_rank
    sizes: dict[Side, int] = {"in": a.update.shape[1], "out": a.update.shape[0]}
    # Two small matrices of inner products, from which all other numbers follow.
    inner: dict[Side, Floats] = {"in": a.right.cross(b.right), "out": a.left.cross(b.left)}
    compared: dict[Side, tuple[Basis, Basis, Floats]]
    if a.factor and b.factor:
        compared = {side: (a.factor, b.factor, a.factor.cross(b.factor))}
    else:
        compared = {"in": (a.right, b.right, inner["in"]), "out": (a.left, b.left, inner["out"])}
    nonzero = a.s.size > 0 < b.s.size  # an update of 0 has no directions
    cosine = update_cosine(a.s, b.s, inner["out"], inner["in"])
    overlaps = {
        one: Overlap.of(first.head(most), second.head(most), G[:most, :most])
        for one, (first, second, G) in compared.items()
    }
    # The mean cos² of all directions.
    spans = {one: min(float((G * G).sum()) / min(G.shape), 1.0) if nonzero else nan for one, G in inner.items()}
    cka = {one: linear_cka(a.energies, b.energies, G) for one, G in inner.items()}
    initial = nan
    if isinstance(a.update, LowRank) and isinstance(b.update, LowRank):
        # Random numbers are drawn row by row, so the first rows of two ranks may be the same numbers.
        rows = min(a.update.rank, b.update.rank)
        initial = vector_cosine(a.update.A[:rows], b.update.A[:rows])
    chance = float(a.energies.sum() * b.energies.sum()) if nonzero else nan  # of CKA in one dimension
    return Similarity(
        other=other,
        side=side,
        shape=a.update.shape,
        ranks=(a.update.rank, b.update.rank),
        directions=(a.s.size, b.s.size),
        norms=(frobenius(a.s), frobenius(b.s)),
        cosine=cosine,
        overlaps=overlaps,
        spans=spans,
        cka=cka,
        cka_chance={one: chance / n for one, n in sizes.items()},
        initial=initial,
    )


@final
@dataclass(frozen=True, slots=True)
class Comparison:
    """Two adapters compared module by module: a mapping from module names of the first to `Similarity`.

    Attributes
    ----------
    modules : mapping of str to Similarity
        The modules that both have, in the order of the first.
    alone : tuple of tuple of str
        The modules that only the first has, and those that only the second has.
    misfits : tuple of str
        The modules that cannot be compared because their shapes differ.
    """

    modules: Mapping[str, Similarity]
    alone: tuple[tuple[str, ...], tuple[str, ...]]
    misfits: tuple[str, ...]

    def __getitem__(self, name: str) -> Similarity:
        return self.modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def items(self) -> ItemsView[str, Similarity]:
        """Pairs of name and `Similarity`."""
        return self.modules.items()

    @property
    def zero(self) -> bool:
        """Whether one of the two updates is 0 in all common modules."""
        return not all(any(norms) for norms in zip(*(one.norms for one in self.modules.values()), strict=True))

    @property
    def cosine(self) -> float:
        """Cosine of the two whole updates over their common modules, in [−1, 1]; 0 if one of them is 0."""
        first, second, cosines = self._arrays()
        return float(np.clip(np.sum(first * second * cosines), -1.0, 1.0))

    @property
    def cosine_z(self) -> float:
        """`cosine` in standard deviations of its null; 0 if one of the updates is 0.

        Under the null the norms stay and the directions are random in every module. Its variance is
        Σ‖ΔW₁‖²‖ΔW₂‖²/(out·in) over the product of the two sums of squared norms.
        """
        first, second, _ = self._arrays()
        spreads = np.array([cosine_spread(one.shape) for one in self.modules.values()])
        # Directions of different modules are independent, so the variances of the terms add up.
        spread = sqrt(np.sum((first * second * spreads) ** 2))
        return self.cosine / spread if spread else 0.0

    def _arrays(self) -> tuple[Floats, Floats, Floats]:
        """The norms of the modules of both adapters, relative to the whole updates, and the cosines of the modules."""
        first, second = np.array([one.norms for one in self.modules.values()]).T
        cosines = np.array([one.cosine for one in self.modules.values()])
        # An update that is 0 in all common modules keeps its norms of 0, and its cosine is 0.
        return first / (frobenius(first) or 1.0), second / (frobenius(second) or 1.0), cosines


def compare_subspaces(
    first: Adapter,
    second: Adapter,
    *,
    of: Of = "update",
    side: Side | None = None,
    modules: Sequence[str] = (),
    phi_rank: int | None = None,
    labels: tuple[str, str] = ("the first", "the second"),
    threads: int = 1,
    step: Step | None = None,
) -> Comparison:
    """Compare two adapters in every module that both have.

    Parameters
    ----------
    first, second : Adapter
        Read one module at a time, each factor once. Modules are matched by name, else by normal form.
    of : str
        The directions that φ and the angles compare. ``update``: the singular directions of ΔW = scale·B·A on both
        sides, which do not change under re-factoring (B G, G⁻¹ A). ``A``: the right singular vectors of A, on the in
        side, as in Hu et al. 2021 §7.2. ``B``: the left singular vectors of B, on the out side. Cosine and CKA are
        always of ΔW.
    side : str, optional
        The side of `Similarity.overlap`: see `side_of`. For the update both sides are measured.
    modules : sequence of str
        Globs over module names or kinds; all where empty.
    phi_rank : int, optional
        The largest number of leading directions that φ and the angles compare; by default all.
    labels : tuple of str
        The names of the two adapters in error messages.
    threads : int
        Modules worked on at a time. More than one pays only where BLAS itself uses one thread.
    step : callable, optional
        Called with 1 after every module.

    Returns
    -------
    Comparison

    Raises
    ------
    OptionError
        A glob matches nothing, or A or B does not have this side.
    MismatchError
        The adapters have no module of one shape in common, rows of one are in the order of llama.cpp, or A or B is
        asked of an update without factors.
    FormatError
        A module holds NaN or Inf.

    Notes
    -----
    No ΔW is formed: the work is O((out + in)(r1 + r2)²) a module. Directions count if their singular value is above
    rounding, σ₁ · max(out, in) · ε. An update of 0 has none, and its φ is empty. φ and the cosine are exact to 1e-12.
    """
    side = side_of(of, side)  # checked before anything is read
    pairs = same_modules(first, second)
    matched = set(pairs.values())
    # Globs may also name modules that only the second has, which are then listed as such.
    chosen = select([*first, *(name for name in second if name not in matched)], modules)
    common = {name: pairs[name] for name in chosen if name in pairs}
    fitting = {name: other for name, other in common.items() if first[name].shape == second[other].shape}
    if not fitting:
        raise _nothing_to_compare(first, second, chosen, common)
    for name, other in fitting.items():
        check_same_rows(name, (first[name], second[other]))

    def measure(name: str) -> Similarity:
        other = fitting[name]
        with place(labels[0]), place(name):
            a = ComparedUpdate.of(first[name], of)
        with place(labels[1]), place(other):
            b = ComparedUpdate.of(second[other], of)
        return measure_similarity(a, b, other=other, side=side, phi_rank=phi_rank)

    return Comparison(
        in_threads(measure, list(fitting), threads, step),
        (
            tuple(name for name in chosen if name not in pairs and name in first),
            tuple(name for name in chosen if name not in pairs and name not in first),
        ),
        tuple(name for name in common if name not in fitting),
    )


def side_of(of: Of, side: Side | None = None) -> Side:
    """The side to compare: by default ``out``, and ``in`` for A; A and B have no other side.

    The in side of ΔW mostly shows the random initialisation of A. Among the adapters in examples/adapters, two tasks
    with one seed share more of it (φ of all directions 0.34 to 0.42) than one task with two seeds (0.07). On the out
    side the order is right: 0.05 to 0.06 for two tasks with one seed, 0.12 for one task with two seeds. Chance gives
    0.02.

    Raises
    ------
    OptionError
        A or B does not have this side.
    """
    if (of, side) in (("A", "out"), ("B", "in")):
        raise OptionError(f"{of} has no {side} side", fix="A is the in side of an update and B the out side")
    return side or ("in" if of == "A" else "out")


def _nothing_to_compare(
    first: Adapter, second: Adapter, chosen: Sequence[str], common: Mapping[str, str]
) -> MismatchError:
    fix = "compare adapters of one base model; `loralens inspect` shows names and shapes"
    for name, other in common.items():  # the first module is enough to show that the bases differ
        first_base, second_base = (adapter.base_model or "a model it does not name" for adapter in (first, second))
        shapes = f"{name} is {first[name].shape} in the first, which adapts {first_base}"
        shapes += f", and {second[other].shape} in the second, which adapts {second_base}"
        return MismatchError(shapes, fix=fix)
    if same_modules(first, second):
        return MismatchError(f"only one of the two adapters has {some(chosen, 1)}", fix="choose others with --modules")
    return MismatchError(f"no module in common: the first has {some(first, 1)}, the second {some(second, 1)}", fix=fix)


SIDES: tuple[Side, Side] = ("in", "out")
Verdict = Literal["shared", "likely", "none", "unknown"]


@final
@dataclass(frozen=True, slots=True)
class SharedInitialisation:
    """Signs of a common initialisation A₀, as means over the modules that both adapters have.

    Attributes
    ----------
    cosine : float
        Cosine of vec(A) between the adapters, including modules with B = 0. It is near 1 if both began from the same A₀
        and training changed A only slightly. It is NaN if there is no A. Random numbers are drawn row by row, so with
        different ranks only the first module can show a common seed.
    alike, compared : int
        The number of modules whose two A have a cosine of at least 0.5, and the number of modules with an A.
    spans, chance : mapping of side to float
        φ(k1, k2) of all directions of ΔW, over modules that are not 0, and its chance level. On the in side this is
        the overlap of the row spaces of the two A in any gauge. NaN if all modules are 0.
    recorded : bool
        Whether the records of both adapters state one A₀. That is decisive, however far training has moved A.
    """

    cosine: float
    alike: int
    compared: int
    spans: Mapping[Side, float]
    chance: Mapping[Side, float]
    recorded: bool = False

    @property
    def one_sided(self) -> bool:
        """Whether the in sides share at least half of their directions, and the out sides less than half of that."""
        # A common task shows on both sides, and a common random A on the in side alone.
        return self.spans["in"] >= SAME_START and self.spans["out"] < self.spans["in"] / 2

    @property
    def both_sided(self) -> bool:
        """Whether the out sides share at least half of what the in sides do, and twice what chance gives."""
        return self.spans["out"] >= max(self.spans["in"] / 2, 2 * self.chance["out"])

    @property
    def verdict(self) -> Verdict:
        """The conclusion from all signs; a record is decisive.

        ``shared``: the A are similar entry by entry (mean cosine ≥ 0.5; independent ones have 0 ± 1/√(r·in)).
        ``likely``: they are not, but the updates agree on the in side alone, which happens if one of the two was
        re-factored. ``unknown``: there is no A and no such sign. ``none``: no sign.
        """
        # The records come first: training may have moved A so far that its numbers do not show its initialisation.
        if self.recorded or self.cosine >= SAME_START:
            return "shared"
        if self.one_sided:
            return "likely"
        return "unknown" if isnan(self.cosine) else "none"

    @property
    def text(self) -> str:
        """One sentence for the user; empty if there is no sign of a common initialisation."""
        known_sides = [side for side in SIDES if not isnan(self.spans[side])]
        spans = ", ".join(f"φ_{side} {self.spans[side]:.3g} (chance {self.chance[side]:.2g})" for side in known_sides)
        spans = f"; {spans}" if spans else ""
        if self.recorded and not self.cosine >= SAME_START:
            return f"shared initialisation: both were trained from the same A₀, as their records say{spans}"
        if self.verdict == "shared":
            return (
                f"shared initialisation: the A of {self.alike} of {self.compared} modules are alike entry by entry "
                f"(mean cosine {self.cosine:.2f}){spans}"
            )
        if self.verdict == "likely":
            return f"a shared initialisation is likely: the two agree on the in side alone{spans}"
        return ""

    @property
    def advice(self) -> str:
        """A sentence that says what to do; empty if `text` is."""
        if not self.text:
            return ""
        if isnan(self.spans["in"]):
            return "one of them is 0 in every module, so there are no directions to compare"
        seed = "directions of the in side show the seed, not the task: look at --side out"
        # If both sides agree, the two may be checkpoints of one run, and the out side shows the common run as well.
        return f"{seed}, where these two agree as well" if self.both_sided else seed


def find_shared_initialisation(comparison: Comparison, *, recorded: bool = False) -> SharedInitialisation:
    """Collect the signs of a common initialisation of the two adapters; see `SharedInitialisation`.

    ``recorded`` is the result of `loralens.core.stored.same_start` on their records.

    The cosine of vec(A) needs the factors as training left them. It is the only number here that depends on how ΔW is
    factored, because a common seed shows in the factors and not in ΔW. Checkpoints of one run share their A₀ too, and
    they agree on both sides.
    """
    # An update of 0 has no directions. Its A counts nevertheless: no training has moved it.
    alive = [one for one in comparison.modules.values() if not one.zero]
    cosines = [one.initial for one in comparison.modules.values() if not isnan(one.initial)]
    ends: dict[Side, int] = {"in": 1, "out": 0}  # of the shape (out, in): the length of a direction on that side
    return SharedInitialisation(
        _mean(cosines),
        sum(cosine >= SAME_START for cosine in cosines),
        len(cosines),
        {side: _mean([one.spans[side] for one in alive]) for side in SIDES},
        {side: _mean([max(one.directions) / one.shape[end] for one in alive]) for side, end in ends.items()},
        recorded,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else nan
