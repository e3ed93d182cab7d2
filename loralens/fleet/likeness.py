"""Exact cosines of updates, over all modules and over the common ones, and the spread that chance would give."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, log, prod, sqrt
from typing import Literal, NamedTuple, final

import numpy as np

from loralens.analysis.equality import differences
from loralens.analysis.two_adapters import SAME_START
from loralens.core.adapter import Adapter, Extra
from loralens.core.fingerprint import LEFT_OUT
from loralens.core.lowrank import LARGEST, Bases, LowRank
from loralens.core.names import normal_form
from loralens.core.structured import Update
from loralens.core.together import BOUND
from loralens.errors import place
from loralens.fleet.catalogue import Member
from loralens.fleet.sketches import START_WIDTH, WIDTH, module_keys
from loralens.formats.records.training import checkpoint_step
from loralens.linalg.chance import cosine_spread
from loralens.linalg.factor import SQUARES, cross_gram, gram
from loralens.linalg.measures import frobenius
from loralens.linalg.subspace import update_cosine
from loralens.tables.numbers import number
from loralens.tables.table import Keys, Recorded

Level = Literal["copy", "run", "family", "similar", ""]

COPY = 0.995  # smallest cosine of two updates that may be copies
COPY_NORM = 0.005  # largest relative difference of their norms
# A copy in bfloat16 differs by 2.3e-3, so two such copies of one adapter, at most 4.6e-3 apart, are found too.
SAME = 5e-3  # largest ‖ΔW₁ − ΔW₂‖/‖ΔW‖ of any module of a copy
RUN = SAME_START  # smallest cosine of the first A of two adapters that have the same initialisation
# Among 207 published adapters of 58 repositories, adapters of different repositories never had more than 0.5, and those
# of one repository and one initialisation had 0.785 or more in nine of ten pairs.
FAMILY = 0.5  # smallest mean cosine within a family
# The same task by different authors gave 0.20 to 0.44, and unrelated bases of equal shape 0.0008 at most.
SIMILAR = 0.2  # smallest cosine of adapters that do something alike

MEANINGS: dict[Level, str] = {
    "copy": "the same update up to rounding, whatever the dialect, dtype, factors or rank",
    "run": "both began from the same random A: checkpoints of one run, or runs with one seed",
    "family": f"cosine at least {FAMILY}: mostly one author, one task, or one adapter trained on",
    "similar": f"cosine at least {SIMILAR}: often the same task by different authors",
    "": f"cosine below {SIMILAR}: nothing in common that the update shows",
}


@final
@dataclass(frozen=True, slots=True)
class ChanceLevels(Recorded):
    """What unrelated adapters give by chance alone.

    Attributes
    ----------
    cosine : float or None
        Standard deviation of the exact cosine of two updates with random directions; its mean is 0. None if it is not
        known, because no update was read.
    among : int
        The number of adapters among which the nearest was looked for.
    """

    cosine: float | None
    among: int

    @classmethod
    def of(cls, spreads: Sequence[float], among: int) -> "ChanceLevels":
        """The levels of pairs of updates with these standard deviations, as one."""
        return cls(hypot(*spreads) / sqrt(len(spreads)) if spreads else None, among)

    @property
    def sketch(self) -> float:
        """Standard deviation of the cosine by sketches of two unrelated updates; its mean is 0."""
        return 1 / sqrt(WIDTH)

    @property
    def start(self) -> float:
        """Standard deviation of the cosine by start sketches of two independent A; its mean is 0."""
        return 1 / sqrt(START_WIDTH)

    @property
    def largest(self) -> float | None:
        """About the largest cosine among that many unrelated adapters: √(2 ln n) standard deviations, at most 1."""
        return None if self.cosine is None else min(1.0, self.cosine * sqrt(2 * log(max(self.among, 2))))

    def sentence(self, *, sketched: bool) -> str:
        """The levels in one sentence."""
        if sketched or self.cosine is None:
            by_sketch = f"0 ± {number(self.sketch, 2)} by sketches of {WIDTH:,} numbers"
            return f"chance: two unrelated updates have a cosine of {by_sketch}"
        return (
            f"chance: two unrelated updates of these shapes have a cosine of 0 ± {number(self.cosine, 2)}, "
            f"and the largest of {self.among:,} is about {number(self.largest, 2)}"
        )

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "cosine",
            "largest",
            "sketch",
            "start",
        )


def level_of(cosine: float, *, start: float = 0.0, copy: bool = False) -> Level:
    """The closest level of a pair.

    Parameters
    ----------
    cosine : float
        Of the whole updates.
    start : float
        Of the start sketches; 0 if one of them has no A.
    copy : bool
        Whether the pair was confirmed to be the same update.
    """
    if copy:
        return "copy"
    if start >= RUN:
        return "run"
    return "family" if cosine >= FAMILY else "similar" if cosine >= SIMILAR else ""


ModuleKey = tuple[str, tuple[int, int]]

# Inner products from Gram matrices err by about ε‖B‖²‖A‖², which is then less than 1e-12 of ‖ΔW‖².
KEPT = 1e-3  # ‖ΔW‖² over ‖B‖²‖A‖² below which too much of a product cancels
# Such a square is the difference of numbers near 1, with an error of 1e-15 for most factors.
TELLING = 1e-8  # square of a relative difference below which it is computed from the stacked factors


@final
class ExactModule:
    """One module of an update, whose numbers are in memory.

    Inner products come from Gram matrices of the factors. Where columns of B cancel in the product, they come from
    singular directions, in which nothing cancels and which take several times as long.

    Attributes
    ----------
    norm : float
        ‖ΔW‖_F.
    """

    __slots__ = ("_bases", "_length", "_pair", "_update", "norm")

    def __init__(self, update: Update) -> None:
        self._update = update.load()
        self._pair: LowRank | None = None
        self._bases: Bases | None = None
        if isinstance(self._update, LowRank):
            pair = self._update
            of_B, of_A = gram(pair.B), gram(pair.A.T)
            lengths, energy = float(of_B.trace()) * float(of_A.trace()), float(np.vdot(of_B, of_A))
            # The comparison is false for NaN too, which `bases` refuses with a message.
            if SQUARES[0] < KEPT * lengths < energy < SQUARES[1] and abs(pair.scale) * sqrt(energy) < LARGEST:
                # The length leaves out the scale, so that an inner product divided by it cannot overflow.
                self._length = sqrt(energy)
                self._pair, self.norm = pair, abs(pair.scale) * self._length
                return
        self.norm = frobenius(self.bases().s)

    def bases(self) -> Bases:
        """The singular directions."""
        if self._bases is None:
            self._bases = self._update.bases()
        return self._bases

    def cosine(self, other: "ExactModule") -> float:
        """The cosine with a module of the same shape; neither of the two is 0."""
        if self._pair and other._pair:
            first, second = self._pair, other._pair
            products = float(np.vdot(cross_gram(first.B, second.B), cross_gram(first.A.T, second.A.T)))
            cosine = products / (self._length * other._length)
            return cosine if (first.scale < 0) == (second.scale < 0) else -cosine
        one, two = self.bases(), other.bases()
        return update_cosine(one.s, two.s, one.left.cross(two.left), one.right.cross(two.right))

    def difference(self, other: "ExactModule") -> float | None:
        """‖ΔW₁ − ΔW₂‖/max(‖ΔW₁‖, ‖ΔW₂‖) with a module of the same shape; None where it is too small to be told."""
        largest = max(self.norm, other.norm)
        if not (self._pair and other._pair and self.norm and other.norm):
            return None
        one, two = self.norm / largest, other.norm / largest
        square = one**2 + two**2 - 2 * one * two * self.cosine(other)
        return sqrt(square) if square > TELLING else None


@final
@dataclass(frozen=True, slots=True)
class ExactUpdate:
    """Every module of one update.

    Attributes
    ----------
    modules : mapping of (normalised name, shape) to ExactModule
        Modules are the same only if their shapes are equal too.
    """

    modules: Mapping[ModuleKey, ExactModule]

    @classmethod
    def of(cls, adapter: Adapter) -> "ExactUpdate":
        """Read an adapter; a FormatError if a module holds NaN or Inf."""
        exact: dict[ModuleKey, ExactModule] = {}
        for name, key in sorted(module_keys(adapter).items(), key=lambda item: item[1]):
            with place(name):
                exact[key, adapter[name].shape] = ExactModule(adapter[name])
        return cls(exact)

    @property
    def norm(self) -> float:
        """‖ΔW‖_F of the whole update."""
        return hypot(*(module.norm for module in self.modules.values()))


class ExactCosine(NamedTuple):
    """The exact cosines of two updates.

    Attributes
    ----------
    cosine : float
        ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖), where a module that one of them lacks counts as 0 there.
    common_cosine : float
        The same over the modules that both have; 0 if there is none.
    common_modules : int
        The number of these.
    spread : float
        Standard deviation of ``cosine`` if the directions were random in every common module.
    """

    cosine: float
    common_cosine: float
    common_modules: int
    spread: float


def exact_cosine(first: ExactUpdate, second: ExactUpdate) -> ExactCosine:
    """The cosines of two updates; 0 where one of them is 0."""
    inner = variance = 0.0
    norms = first.norm or 1.0, second.norm or 1.0
    pairs: list[tuple[float, float]] = []
    shared = [key for key in first.modules if key in second.modules]
    for key in shared:
        one, other = first.modules[key], second.modules[key]
        # Shares of the norms of whole updates have products that neither overflow nor underflow.
        shares = one.norm / norms[0], other.norm / norms[1]
        if all(shares):
            inner += shares[0] * shares[1] * one.cosine(other)
            # Directions of different modules are independent, so their variances add up.
            variance += (shares[0] * shares[1] * cosine_spread(key[1])) ** 2
        pairs.append(shares)
    common = prod(hypot(*side) for side in zip(*pairs, strict=True)) if pairs else 0.0
    return ExactCosine(_ratio(inner, 1.0), _ratio(inner, common), len(shared), sqrt(variance))


def _ratio(inner: float, norms: float) -> float:
    """A cosine, which rounding may not carry beyond ±1."""
    return float(np.clip(inner / norms, -1.0, 1.0)) if norms else 0.0


Kind = Literal["tensors", "update", "close", ""]


@final
@dataclass(frozen=True, slots=True)
class Sameness:
    """How much two adapters are the same.

    Attributes
    ----------
    kind : str
        ``tensors``: the same numbers, under any names and in any dialect. ``update``: the same ΔW up to rounding, in
        another dtype, with other factors or another rank. ``close``: a cosine of at least 0.995 and norms within
        0.5 %, but not the same: see ``reason``. Empty: none of these.
    cosine : float
        Of the whole updates, exact.
    difference : float
        ‖ΔW₁ − ΔW₂‖/‖ΔW‖ of the worst module; 0 for ``tensors``.
    reason : str
        Why two close adapters are not copies, in words.
    """

    kind: Kind
    cosine: float
    difference: float
    reason: str = ""

    @property
    def is_copy(self) -> bool:
        """Whether one of the two can replace the other."""
        return self.kind in ("tensors", "update")


TENSORS = Sameness("tensors", 1.0, 0.0)


def judge_sameness(first: Adapter, second: Adapter, *, steps: Sequence[Collection[int]] = ((), ())) -> Sameness:
    """Compare two adapters exactly, module by module, and their other tensors.

    Parameters
    ----------
    first, second : Adapter
        Two adapters whose fingerprints differ.
    steps : two collections of int
        The training steps of both, and of files with the same numbers; empty if they are unknown. Two steps are two
        adapters, however little training has changed between them.

    Raises
    ------
    FormatError
        A module holds NaN or Inf.
    """
    updates = ExactUpdate.of(first), ExactUpdate.of(second)
    cosine = exact_cosine(*updates).cosine
    norms = sorted(update.norm for update in updates)
    if cosine < COPY or norms[1] - norms[0] > COPY_NORM * norms[1]:
        return Sameness("", cosine, float("inf"))
    difference = _largest_difference(first, second, updates)
    if all(steps) and not set(steps[0]) & set(steps[1]):
        low, high = sorted(max(known) for known in steps)
        return Sameness("close", cosine, difference, f"steps {low} and {high}")
    if difference > SAME:
        return Sameness("close", cosine, difference, "differs by more than rounding")
    if other := _differing_extra(first, second):
        return Sameness("close", cosine, difference, f"{other} differs")
    return Sameness("update", cosine, difference)


def _largest_difference(first: Adapter, second: Adapter, updates: tuple[ExactUpdate, ExactUpdate]) -> float:
    """The relative difference of the module that differs most."""
    one, other = (update.modules for update in updates)
    if one.keys() == other.keys():
        # The inner products are known, so differences come from them where they are large enough to be told.
        told = [module.difference(other[key]) for key, module in one.items()]
        if told and None not in told:
            return max(filter(None, told))
    return max((module.relative for module in differences(first, second)), default=0.0)


def known_steps(members: Iterable[Member]) -> set[int]:
    """The training steps of members with equal numbers, as their paths or the states of their trainers say.

    A final adapter has no step in its name, but the last checkpoint of its run has the same numbers.
    """
    return {step for member in members if (step := checkpoint_step(member.path)) is not None}


def _differing_extra(first: Adapter, second: Adapter) -> str:
    """A trained tensor outside of the pairs that differs, or that only one adapter has; empty if there is none."""
    one, other = _extras(first), _extras(second)
    for key in sorted(one.keys() | other.keys()):
        if key not in one or key not in other or not _nearly_equal(one[key], other[key]):
            role, module, parameter = key
            # A magnitude or a bias of B belongs to an update; anything else is a parameter of the model.
            return f"{role.replace('_', ' ')} of {module}" if role in BOUND else f"{module}.{parameter}"
    return ""


def _extras(adapter: Adapter) -> dict[tuple[str, str, str], Extra]:
    """Role, module and parameter → tensor, without the tensors that repeat others."""
    return {
        (extra.role, normal_form(extra.module), extra.parameter): extra
        for extra in adapter.extra.values()
        if extra.role not in LEFT_OUT
    }


def _nearly_equal(first: Extra, second: Extra) -> bool:
    """Whether two tensors are equal up to the rounding of a dtype."""
    if first.tensor.shape != second.tensor.shape:
        return False
    x, y = (extra.tensor.read().astype(np.float64) for extra in (first, second))
    return bool(np.linalg.norm(x - y) <= SAME * max(np.linalg.norm(x), np.linalg.norm(y)))
