"""What a watcher measures in a module at a snapshot, and the warnings of a run that goes wrong."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite, nan, sqrt
from statistics import fmean
from typing import Any, NamedTuple, final

import numpy as np

from loralens.analysis.learning_checks import SPIKE_ENERGY, SPIKE_RANK
from loralens.analysis.spectrum import Spectrum
from loralens.choices import Side
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.core.names import some
from loralens.core.structured import Update
from loralens.linalg.measures import frobenius
from loralens.linalg.product import QuickSVD, column_basis, quick_svd
from loralens.linalg.rounding import survivors
from loralens.linalg.subspace import phi_map, update_cosine
from loralens.tables.numbers import json_number

DIGITS = 6  # significant digits in the log; the numbers are measured about as accurately


@final
@dataclass(frozen=True, slots=True)
class Turn:
    """The directions of a module compared with those of an earlier snapshot.

    Attributes
    ----------
    norm : float
        ‖ΔW‖_F of the earlier snapshot.
    length : float
        ‖ΔW − ΔW of the earlier snapshot‖_F, to 1e-3 of the larger norm.
    cosine : float
        The cosine of the two ΔW, in [−1, 1].
    phi, chance : mapping of side to float
        φ of all directions, and its mean for random ones.
    """

    norm: float
    length: float
    cosine: float
    phi: Mapping[Side, float]
    chance: Mapping[Side, float]


@final
@dataclass(frozen=True, slots=True)
class GradientMeasures:
    """The gradient of one factor.

    Attributes
    ----------
    norm : float
        The Frobenius norm of the gradient as it is in memory: after clipping, and averaged as the trainer averages it.
    effective_rank : float
        exp(−Σ p ln p), p = σ/Σσ.
    overlap, chance : float
        The share of its energy in the directions of ΔW, on the out side for B and on the in side for A, and the share
        that random directions would have. NaN if the gradient or ΔW is 0.
    """

    norm: float
    effective_rank: float
    overlap: float
    chance: float


@final
@dataclass(frozen=True, slots=True)
class ModuleSnapshot:
    """What a watcher measures in a module at a snapshot.

    Attributes
    ----------
    spectrum : Spectrum
        Singular values above 1e-6 of the first; none if ΔW = 0.
    previous, first : Turn or None
        Compared with the last snapshot, and with the first one in which ΔW was not 0; None before that.
    drift : float
        ‖A − A₀‖_F/‖A₀‖_F, where A₀ is A at the first snapshot. For an embedding it is the drift of B, the
        factor that is drawn at random there. NaN if the module is not a pair.
    gradients : mapping of str to GradientMeasures
        The gradients of ``B`` and ``A``; empty if they are not watched.
    """

    spectrum: Spectrum
    previous: Turn | None
    first: Turn | None
    drift: float
    gradients: Mapping[str, GradientMeasures]

    def record(self) -> dict[str, Any]:
        """The measures as a JSON object."""
        spectrum = self.spectrum
        return {
            "s": [short_number(value) for value in spectrum.s.tolist()],
            **{name: short_number(getattr(spectrum, name)) for name in ("frobenius", "stable_rank", "effective_rank")},
            "previous": self.previous and _shortened(asdict(self.previous)),
            "first": self.first and _shortened(asdict(self.first)),
            "drift": short_number(self.drift),
            **({"gradients": {n: _shortened(asdict(g)) for n, g in self.gradients.items()}} if self.gradients else {}),
        }


@final
@dataclass(slots=True)
class Memory:
    """What a watcher remembers about a module: the first A, and the directions of the first and last snapshot."""

    start: Array | None = None
    first: QuickSVD | None = None
    previous: QuickSVD | None = None


def remember_start(module: Update, memory: Memory) -> None:
    """Remember the first A, from which drift is measured."""
    if isinstance(module, LowRank):
        memory.start = _random_factor(module, module.B, module.A).copy()


def measure_module(module: Update, memory: Memory, gradient: LowRank | None) -> ModuleSnapshot:
    """Measure a module, and remember its directions. Each factor is read once.

    Raises
    ------
    FormatError
        A factor holds NaN or Inf.
    """
    drift = nan
    if isinstance(module, LowRank):
        B, A = module.B, module.A
        directions = quick_svd(B, A, module.scale)
        drawn = _random_factor(module, B, A)
        if memory.start is None:
            memory.start = drawn.copy()
        length = float(np.linalg.norm(memory.start))
        drift = float(np.linalg.norm(drawn - memory.start)) / length if length else nan
    else:
        bases = module.bases()
        U, V = (basis.columns().astype(np.float32) for basis in (bases.left, bases.right))
        directions = QuickSVD(U, bases.s, V)
    snapshot = ModuleSnapshot(
        spectrum=Spectrum(directions.s, module.shape, module.rank),
        previous=_turn(directions, memory.previous),
        first=_turn(directions, memory.first),
        drift=drift,
        gradients={}
        if gradient is None
        else {"B": _gradient(gradient.B, directions.U), "A": _gradient(gradient.A.T, directions.V)},
    )
    memory.previous = directions
    # Before the first step ΔW is 0, and has no directions.
    if memory.first is None and directions.k:
        memory.first = directions
    return snapshot


def _random_factor(module: LowRank, B: Array, A: Array) -> Array:
    """The factor that is drawn at random: A, and B of an embedding."""
    return np.asarray(B if module.layout.kind == "embedding" else A, dtype=np.float32)


def _turn(now: QuickSVD, before: QuickSVD | None) -> Turn | None:
    """The directions compared with earlier ones; None if one of the two snapshots has no directions."""
    if before is None or not (now.k and before.k):
        return None
    # Products in float32 are accurate enough, since φ needs three digits.
    left, right = (np.dot(x.T, y).astype(np.float64) for x, y in ((before.U, now.U), (before.V, now.V)))
    phi: dict[Side, float] = {"in": float(phi_map(right)[-1, -1]), "out": float(phi_map(left)[-1, -1])}
    chance: dict[Side, float] = {
        "in": min(max(now.k, before.k) / len(now.V), 1.0),
        "out": min(max(now.k, before.k) / len(now.U), 1.0),
    }
    cosine = update_cosine(before.s, now.s, left, right)
    norm, own = frobenius(before.s), frobenius(now.s)
    # Rounding may make the square of a length of 0 negative.
    length = sqrt(max(norm**2 + own**2 - 2 * cosine * norm * own, 0.0))
    return Turn(norm, length, cosine, phi, chance)


def _gradient(factor: Array, columns: Array) -> GradientMeasures:
    basis, s = column_basis(factor)
    spectrum = Spectrum(s, (factor.shape[0], factor.shape[1]), factor.shape[1])
    overlap = chance = nan
    if s.size and columns.shape[1]:
        inside = np.square(basis.columns().T @ columns).sum(axis=1)
        energy = np.square(s / s[0])
        overlap = float(np.clip(energy @ inside / energy.sum(), 0.0, 1.0))
        chance = columns.shape[1] / len(columns)
    return GradientMeasures(spectrum.frobenius, spectrum.effective_rank, overlap, chance)


def _shortened(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers with the digits of the log, also inside of mappings."""
    return {key: _shortened(v) if isinstance(v, Mapping) else short_number(v) for key, v in values.items()}


def defined_mean(values: Iterable[float]) -> float:
    """The mean of the numbers that are finite; NaN if none is."""
    defined = [value for value in values if isfinite(value)]
    return sum(defined) / len(defined) if defined else nan


def short_number(value: float) -> float | None:
    """A number with the digits of the log; None if it is not defined."""
    number = json_number(value)
    return None if number is None else float(f"{number:.{DIGITS}g}")


# code → what it means. The order is that of the documentation.
WARNINGS = {
    "diverges": "The mean loss since the last snapshot is more than 1.5 times that of the first step and of the "
    "lower quartile of all earlier steps; and the gradient norm is more than three times its lower quartile, or the "
    "snapshot before showed such a loss too.",
    "spike": "One direction holds at least 99 % of the energy of a module of rank 4 or more. Random factors give a "
    "direction about 1/r of it.",
    "collapse": "The effective rank of a module has fallen to less than half of the highest that it had.",
    "rank-saturated": "The energy is spread over the directions as evenly as that of random factors, up to 5 %: the "
    "rank is too small for what is learnt, or what is learnt is noise.",
    "zero-update": "ΔW is still exactly 0 after the first steps: the module gets no gradient.",
    "norm-explodes": "‖ΔW‖ is more than 16 typical singular values of W (‖W‖/√min(out, in)), or grows by more than "
    "0.25 of them in a step where the loss is not known, or has grown between two snapshots by more than ten times the "
    "square of the ratio of their steps. Both factors move at most in proportion to the steps while the learning rate "
    "is constant.",
    "below-rounding": "No singular value of ΔW is above the edge of the noise that rounding adds when ΔW is merged "
    "into weights of this dtype.",
    "A-still": "A has not moved, although B has moved.",
    "not-finite": "A factor holds NaN or Inf.",
}
_SLOWER = "lower the learning rate, or add warm-up and gradient clipping; go back to a checkpoint"
FIXES = {
    "diverges": _SLOWER,
    "spike": "look for examples that are repeated many times; while the loss falls, nothing needs to be done",
    "collapse": "lower the learning rate from here on, or go back to a checkpoint from before",
    "rank-saturated": "try a larger rank; if the loss does not fall either, lower the learning rate",
    "zero-update": "check that the module runs in the forward pass and that its B is in the optimiser",
    "norm-explodes": _SLOWER,
    "below-rounding": "train longer or with a higher learning rate; else use the adapter unmerged, or merge in f32",
    "A-still": "check that A is in the optimiser and that its learning rate is not far below that of B",
    "not-finite": "lower the learning rate, and go back to the last checkpoint without NaN",
}
SHARE = 0.5  # share of the modules that must show a problem, since single modules of healthy runs show most problems
SINGLE = ("zero-update", "not-finite")  # problems for which one module is enough
FALL = 0.5  # a collapse is an effective rank below this share of the highest one
EVEN = 0.95  # limit for participation ratio/r, which is 1 for random factors if r is small beside out and in
# The limits of a diverging run are set by the runs of examples/watch_runs.py; docs/watch.md has the figures.
LOSS = 1.5
GRADIENT = 3.0
LARGEST = 16.0  # of ‖W‖/√min(out, in), the root mean square of the singular values of W
FASTEST = 0.25  # of the same, in one step, where the loss does not tell
WIDE = 256  # narrower weights bear faster updates
GROWTH = 10.0
STILL = 1e-8  # of ‖A‖: plain SGD moves A by 6e-7 to 5e-5 in ten steps, since its gradient is proportional to B
YOUNG = 3  # snapshots with a ΔW that is not 0 before it is judged by its shape


@final
@dataclass(frozen=True, slots=True)
class HealthWarning:
    """A warning that a run goes wrong.

    Attributes
    ----------
    code : str
        A key of `WARNINGS`.
    step : int
        The step of the snapshot that shows it.
    modules : tuple of str
        The modules that show it.
    text, fix : str
        The evidence, and what to do; one sentence each.
    """

    code: str
    step: int
    modules: tuple[str, ...]
    text: str
    fix: str

    def record(self) -> dict[str, Any]:
        """The warning as a JSON object."""
        return {**asdict(self), "modules": list(self.modules)}


class WeightSize(NamedTuple):
    """The size of an adapted weight W: ‖W‖_F, and the standard deviation of rounding where its dtype has 16 bits."""

    norm: float | None = None
    noise: float | None = None


@final
@dataclass(slots=True)
class Curve:
    """A number of every step, such as the loss; steps without a finite one are left out."""

    values: list[float] = field(default_factory=list)
    _new: list[Any] = field(default_factory=list)

    def add(self, value: Any) -> None:
        """Add the number of a step, or a tensor of it, which is not read before `take`: that waits for the device."""
        self._new.append(value)

    def take(self) -> tuple[float, float]:
        """The mean of the numbers since the last call, and the lower quartile of those before (or of the first one).

        A run that has diverged raises its median soon, and its lower quartile later.
        """
        new = [value for value in map(float, self._new) if isfinite(value)]
        self._new.clear()
        before = self.values or new[:1]
        self.values += new
        return (fmean(new), float(np.quantile(before, 0.25, method="lower"))) if new else (nan, nan)


class _Past(NamedTuple):
    """What the rules need to know about the earlier snapshots of a module."""

    snapshots: int
    step: int
    norm: float
    peak: float
    codes: frozenset[str]


@final
@dataclass(slots=True)
class Health:
    """Judges one snapshot after the other.

    The limit of every problem is one that random numbers do not reach by chance, or it follows from a bound. A problem
    of a module counts if two snapshots in a row show it, since a single snapshot may be an exception. Healthy runs show
    most problems in single modules, so a warning of these is given only if half of the modules have the problem. Each
    warning is given once.

    Attributes
    ----------
    weights : mapping of str to WeightSize
        The sizes of the adapted weights. Modules without an entry are judged without their weight.
    frozen : bool
        Whether A is frozen on purpose, so that it need not move.
    losses, gradients : Curve
        The loss and the norm of the gradient before clipping, of every step for which they are known.
    loss, gradient : float
        Their means between the last two snapshots; NaN if they are not known.
    """

    weights: Mapping[str, WeightSize] = field(default_factory=dict)
    frozen: bool = False
    losses: Curve = field(default_factory=Curve)
    gradients: Curve = field(default_factory=Curve)
    loss: float = nan
    gradient: float = nan
    _was_high: bool = False
    _past: dict[str, _Past] = field(default_factory=dict)
    _reported: set[str] = field(default_factory=set)

    def check(self, step: int, snapshots: Mapping[str, ModuleSnapshot]) -> list[HealthWarning]:
        """The warnings that this snapshot gives for the first time."""
        divergence = self._divergence()
        evidence: dict[str, dict[str, str]] = {}
        for name, snapshot in snapshots.items():
            before = self._past.get(name, _Past(0, -1, 0.0, 0.0, frozenset()))
            weight = self.weights.get(name, WeightSize())
            still = None if self.frozen else STILL
            problems = dict(_problems(snapshot, step, before, still, weight, judge_speed=not self.losses.values))
            for code, text in problems.items():
                if code in before.codes or code == "norm-explodes":
                    evidence.setdefault(code, {})[name] = text
            spectrum = snapshot.spectrum
            started = before.snapshots or spectrum.s.size
            # The first snapshots do not count for the highest effective rank, with which later ones are compared.
            peak = max(before.peak, spectrum.effective_rank if before.snapshots >= YOUNG else 0.0)
            self._past[name] = _Past(
                before.snapshots + 1 if started else 0, step, spectrum.frobenius, peak, frozenset(problems)
            )
        warnings = [
            warning
            for code in WARNINGS
            if code in evidence and (warning := self._report(code, step, evidence[code], len(snapshots))) is not None
        ]
        if divergence and "diverges" not in self._reported:
            self._reported.add("diverges")
            warnings.insert(0, HealthWarning("diverges", step, (), divergence, FIXES["diverges"]))
        return warnings

    def _divergence(self) -> str:
        """The evidence that the loss explodes; empty if it does not. The losses since the last snapshot are used up."""
        (self.loss, usual), (self.gradient, usual_gradient) = self.losses.take(), self.gradients.take()
        # A loss that changes its sign, as that of reinforcement learning, is no measure of success.
        known = isfinite(self.loss) and min(self.losses.values) > 0
        first = self.losses.values[0] if known else nan
        high = known and self.loss > LOSS * max(first, usual)
        steep = self.gradient > GRADIENT * usual_gradient
        shown, self._was_high = high and (steep or self._was_high), high
        if not shown:
            return ""
        text = f"the mean loss since the last snapshot is {self.loss:.3g}; at the first step it was {first:.3g}"
        times = f", and the gradient norm is {self.gradient / usual_gradient:.3g} times as large" if steep else ""
        return text + times

    def mark_as_reported(self, codes: Iterable[str]) -> None:
        """Do not give these warnings: an earlier process has given them."""
        self._reported |= set(codes)

    def warn_not_finite(self, step: int, name: str) -> HealthWarning | None:
        """The warning that a factor holds NaN or Inf."""
        return self._report("not-finite", step, {name: "a factor holds NaN or Inf"}, 1)

    def _report(self, code: str, step: int, evidence: Mapping[str, str], modules: int) -> HealthWarning | None:
        """The warning, if enough modules show the problem and it has not been reported."""
        if code in self._reported or (code not in SINGLE and len(evidence) < SHARE * modules):
            return None
        self._reported.add(code)
        name, text = next(iter(evidence.items()))
        subject = name if len(evidence) == 1 else f"{len(evidence)} of {modules} modules ({some(list(evidence), 1)})"
        return HealthWarning(code, step, tuple(evidence), f"{subject}: {text}", FIXES[code])


def _problems(
    snapshot: ModuleSnapshot, step: int, before: _Past, still: float | None, weight: WeightSize, *, judge_speed: bool
) -> Iterator[tuple[str, str]]:
    """The code and the evidence of every problem that a snapshot of one module shows."""
    spectrum, s = snapshot.spectrum, snapshot.spectrum.s
    if not s.size:
        # A warm-up that begins with a rate of 0 leaves ΔW = 0 for one step, which is why one snapshot does not count.
        if step > 0:
            yield "zero-update", f"ΔW is 0 after {step} steps"
        return
    typical = (weight.norm or 0.0) / sqrt(min(spectrum.shape))
    # Without an earlier snapshot it is not known in how many steps ΔW has grown.
    judge_speed = judge_speed and max(spectrum.shape) >= WIDE and 0 <= before.step < step
    speed = (spectrum.frobenius - before.norm) / (step - before.step) if judge_speed else 0.0
    if typical and spectrum.frobenius > LARGEST * typical:
        yield "norm-explodes", f"‖ΔW‖ is {spectrum.frobenius / typical:.3g} typical singular values of W"
    elif typical and speed > FASTEST * typical:
        yield "norm-explodes", f"‖ΔW‖ grows in a step by {speed / typical:.3g} typical singular values of W"
    elif before.norm and before.step > 0:
        growth, bound = spectrum.frobenius / before.norm, GROWTH * (step / before.step) ** 2
        if growth > bound:
            yield "norm-explodes", f"‖ΔW‖ is {growth:.3g} times that of step {before.step}; {bound:.3g} is the limit"
    if before.snapshots < YOUNG:
        return
    yield from _problems_of_shape(spectrum, before)
    if weight.noise and survivors(s, weight.noise, spectrum.shape) == 0:
        edge = weight.noise * (spectrum.shape[0] * spectrum.shape[1]) ** 0.25
        yield "below-rounding", f"σ₁ is {s[0]:.2g}, and the noise of rounding reaches {edge:.2g}"
    if still is not None and isfinite(snapshot.drift) and snapshot.drift < still:
        yield "A-still", f"A has not moved in {step} steps"


def _problems_of_shape(spectrum: Spectrum, before: _Past) -> Iterator[tuple[str, str]]:
    """The problems that the singular values show, whatever their size."""
    rank = min(spectrum.rank, *spectrum.shape)
    if spectrum.effective_rank < FALL * before.peak:
        yield "collapse", f"the effective rank fell from {before.peak:.3g} to {spectrum.effective_rank:.3g}"
    if rank < SPIKE_RANK:
        return
    if spectrum.stable_rank < 1 / SPIKE_ENERGY:
        share = 1 / spectrum.stable_rank
        yield "spike", f"one of {rank} directions holds {share:.1%} of the energy, by chance {1 / rank:.0%}"
    if spectrum.participation_ratio > EVEN * rank:
        yield "rank-saturated", f"the energy is that of {spectrum.participation_ratio:.3g} equal directions of {rank}"
