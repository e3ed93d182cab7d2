"""The joint coding of a group of adapters: bases U and V of every module for all, and a core C for each adapter.

ΔW_i ≈ U C_i Vᵀ. U and V are the leading directions of all updates of a module together: a higher-order SVD (De
Lathauwer, De Moor & Vandewalle 2000), followed by one alternation, in which U is computed again for the chosen V, and V
for that U. Every adapter is divided by its own norm first, so that a strong one does not take the bases for itself.

One number, the price θ, decides how much of the bases is stored. It is the energy, in units of ‖ΔW_i‖², that one more
bit has to save. It gives the number of columns and the bits of each column by the rule of `loralens.compression.bits`:
every bit is spent where it saves most. The core of an adapter is then fitted to the rounded bases, and rounded with the
largest step with which the adapter keeps its error. Several prices are tried, and the one with the fewest bytes wins.
An adapter that does not reach the error, or takes less alone, counts with the bytes that it takes alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from loralens.compression.joint.split import SplitUpdate
from loralens.core.few_bits.shared_bases import MOST_WIDTH, STEP, WIDTH_BITS
from loralens.linalg.factor import Floats
from loralens.linalg.few_bits.columns import (
    CodedColumns,
    entries_bytes,
    entry_widths,
    round_columns,
)
from loralens.linalg.few_bits.packing import packed_length
from loralens.linalg.few_bits.quantise import SIDE
from loralens.linalg.leading import LeadingDirections, leading_directions

LARGEST_INTEGER = 2 ** (MOST_WIDTH - 1) - 1  # of an entry of a core
SMALLEST_STEP, LARGEST_STEP = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
# A column gets b bits if its energy for every stored number is at least THRESHOLDS[b - 2] prices. The noise falls by
# the differences of _NOISE, and the price is paid for every bit.
_NOISE = (1.0, *SIDE[:7])  # of 0, 2, 3 … 8 bits
THRESHOLDS = tuple(bits / (a - b) for a, b, bits in zip(_NOISE, _NOISE[1:], (2, *(1,) * 6), strict=False))
PRICES = 2.0 ** np.arange(-4, 9)[::-1]  # prices that are tried, in units of the first guess, the largest first
ROUNDS = 10  # halvings of the interval of a step on a logarithmic scale of 2¹²


class ModuleBases(NamedTuple):
    """The bases of one module: U (out, p) and V (in, q) in integers."""

    out: CodedColumns
    in_: CodedColumns


@final
@dataclass(frozen=True, slots=True)
class JointCoding:
    """A group in integers.

    Attributes
    ----------
    bases : sequence of ModuleBases
        By module.
    widths : uint8 array, shape (entries,)
        Bits of every entry of a core: the entries of all modules, row by row, in the order of ``bases``.
    members : int array, shape (n,)
        Which adapters of the group are coded.
    steps : float32 array, shape (n,)
    integers : int16 array, shape (n, entries)
        The core of an adapter is its step times its integers.
    errors : float64 array, shape (n,)
        ‖ΔW − ΔW'‖/‖ΔW‖ of each member, with factors of full width.
    """

    bases: Sequence[ModuleBases]
    widths: NDArray[np.uint8]
    members: NDArray[np.int64]
    steps: NDArray[np.float32]
    integers: NDArray[np.int16]
    errors: Floats

    @property
    def shared_bytes(self) -> int:
        """The size of the bases and of the widths, which all members share."""
        bases = sum(side.nbytes for module in self.bases for side in module)
        return bases + packed_length(self.widths.size, WIDTH_BITS)

    @property
    def core_bytes(self) -> int:
        """The size of the core of one member."""
        return STEP + entries_bytes(self.widths)


class _Rounded(NamedTuple):
    """The rounded bases of one module, and the cores that fit them best."""

    bases: ModuleBases
    triangles: tuple[Floats, Floats]  # G_U (p, p) and G_V (q, q) with U = Q_U G_Uᵀ, Q_U orthonormal
    projected: Floats  # (n, p, q): Q_Uᵀ ΔW_i Q_V
    cores: Floats  # (n, p, q): C_i, for which ‖ΔW_i − U C_i Vᵀ‖ is smallest


def code_jointly(updates: Sequence[Sequence[SplitUpdate]], alone: Sequence[int], *, error: float) -> JointCoding | None:
    """Code a group of adapters in shared bases, as far as that takes fewer bytes than each of them alone.

    Parameters
    ----------
    updates : sequence of sequence of SplitUpdate
        For every adapter its modules, in one order. None of the adapters is 0.
    alone : sequence of int
        The bytes that each adapter takes alone.
    error : float
        The largest ‖ΔW − ΔW'‖/‖ΔW‖ of each adapter.

    Returns
    -------
    JointCoding or None
        The adapters that take fewer bytes with the bases; None if the bases do not pay for any.
    """
    norms = np.array([sqrt(sum(update.energy for update in adapter)) for adapter in updates])
    units = [[update.divided(norm) for update in adapter] for adapter, norm in zip(updates, norms, strict=True)]
    costs, members = np.asarray(alone, float), np.arange(len(updates))
    best: tuple[float, JointCoding] | None = None
    # Adapters that do not fit the bases make them worse for the others, so the bases are computed again without them.
    while members.size > 1:
        trial = _Group([units[i] for i in members], members, norms[members], costs[members], error).cheapest()
        if trial is None or (best and trial[0] + costs.sum() - costs[members].sum() >= best[0]):
            break
        best = trial[0] + costs.sum() - costs[members].sum(), trial[1]
        if trial[1].members.size == members.size:
            break
        members = trial[1].members
    if best is None or best[0] >= costs.sum():
        return None
    coding = best[1]
    # Until here the steps are those of updates of norm 1.
    return JointCoding(
        coding.bases, coding.widths, coding.members, (coding.steps * norms[coding.members]).astype(np.float32),
        coding.integers, coding.errors,
    )  # fmt: skip


@final
class _Group:
    """Adapters of norm 1 that are coded together."""

    def __init__(
        self,
        units: Sequence[Sequence[SplitUpdate]],
        members: NDArray[np.int64],
        norms: Floats,
        alone: Floats,
        error: float,
    ) -> None:
        self.modules = list(zip(*units, strict=True))  # by module: the updates of all members
        self.members, self.norms, self.alone, self.error = members, norms, alone, error
        numbers = sum(sum(u.shape) * u.left.shape[1] for (u, *_) in self.modules)
        # The noise of each number if an eighth of the allowed noise came from bases of the size of one adapter.
        self.guess = len(members) * error**2 / numbers / 8
        # The lengths of the columns belong to both sides.
        self.out_sides = [self._directions([u.left for u in module]) for module in self.modules]
        self.in_sides = [self._directions([u.right * u.singular_values for u in module]) for module in self.modules]

    def _directions(self, factors: Sequence[Floats]) -> LeadingDirections:
        """The leading directions of some factors side by side, as far as a price that is tried needs them."""
        directions = _worth(leading_directions(np.hstack(factors)), self.guess * PRICES[-1])
        # A copy, so that the others do not stay in memory.
        return LeadingDirections(directions.columns.copy(), directions.energies)

    def cheapest(self) -> tuple[float, JointCoding] | None:
        """The total bytes, those of members that are better alone included, and the coding of the others."""
        best: tuple[float, float] | None = None
        worse = 0
        for factor in PRICES:
            total = self._total(trial) if (trial := self.at(self.guess * factor)) else np.inf
            if best is None or total < best[0]:
                best, worse = (total, self.guess * factor), 0
            elif best[0] < np.inf:
                worse += 1
            # Bytes have one minimum over the price, apart from steps of single columns.
            if worse == 2:
                break
        if best is None or best[0] == np.inf:
            return None
        coded = [c for c in (self.at(best[1]), self.at(best[1], alternate=True)) if c]
        coding = min(coded, key=self._total)
        return self._total(coding), coding

    def _total(self, coding: JointCoding) -> float:
        stay = ~np.isin(self.members, coding.members)
        return coding.shared_bytes + coding.members.size * coding.core_bytes + float(self.alone[stay].sum())

    def at(self, price: float, *, alternate: bool = False) -> JointCoding | None:
        """The group in the bases of this price; None if no member reaches the error, or is better alone."""
        rounded = [self._round(k, price, alternate=alternate) for k in range(len(self.modules))]
        fitted = [module for module in rounded if module.cores.shape[1] and module.cores.shape[2]]
        steps = self._steps(fitted)
        joint = np.flatnonzero(np.isfinite(steps))
        while joint.size:
            integers = _integers(fitted, joint, steps[joint])
            widths = entry_widths(integers)
            # Core sizes are equal, so a member that is smaller alone is so whatever the others do.
            pays = self.alone[joint] > STEP + entries_bytes(widths)
            if pays.all():
                break
            joint = joint[pays]
        if not joint.size:
            return None
        return JointCoding(
            [module.bases for module in rounded], widths, self.members[joint], steps[joint].astype(np.float32),
            integers.astype(np.int16), np.sqrt(self._squared_errors(fitted, steps))[joint],
        )  # fmt: skip

    def _round(self, k: int, price: float, *, alternate: bool) -> _Rounded:
        """The bases of module k at a price, rounded, and the cores that fit them."""
        module = self.modules[k]
        in_side, out_side = _worth(self.in_sides[k], price), _worth(self.out_sides[k], price)
        if alternate and out_side.energies.size and in_side.energies.size:
            out_side = _again([(u.left, u.right) for u in module], in_side, out_side.energies.size)
            in_side = _again([(u.right, u.left) for u in module], out_side, in_side.energies.size)
        U, V = _round_side(out_side, price), _round_side(in_side, price)
        Q_out, Q_in = U.values.astype(np.float64), V.values.astype(np.float64)
        G_out, G_in = (np.asarray(np.linalg.cholesky(Q.T @ Q), np.float64) for Q in (Q_out, Q_in))
        crossed = np.array([(Q_out.T @ u.left) @ (u.right.T @ Q_in) for u in module])
        inverse_out, inverse_in = np.linalg.inv(G_out), np.linalg.inv(G_in)
        projected = inverse_out @ crossed @ inverse_in.T
        return _Rounded(ModuleBases(U, V), (G_out, G_in), projected, inverse_out.T @ projected @ inverse_in)

    def _steps(self, fitted: Sequence[_Rounded]) -> Floats:
        """The largest step of each member with which it keeps the error; NaN if none can be stored."""
        n = len(self.members)
        largest = np.max([np.abs(m.cores).max(axis=(1, 2)) for m in fitted], axis=0) if fitted else np.zeros(n)
        low = np.maximum(largest, 1e-30) / LARGEST_INTEGER
        high = low * LARGEST_INTEGER
        feasible = self._squared_errors(fitted, low) <= self.error**2
        for _ in range(ROUNDS):
            middle = np.sqrt(low * high)
            fits = self._squared_errors(fitted, middle) <= self.error**2
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        # Rounded towards 0 to float32, as the file stores it.
        steps = low * (1 - 1e-6)
        # The stored step is that of ΔW and not of ΔW/‖ΔW‖. Beyond float32 it would be Inf, and below its normal numbers
        # it would lose digits.
        stored = steps * self.norms
        feasible &= (stored >= SMALLEST_STEP) & (stored <= LARGEST_STEP)
        return np.where(feasible, steps, np.nan)

    def _squared_errors(self, fitted: Sequence[_Rounded], steps: Floats) -> Floats:
        """‖ΔW_i − U C_i Vᵀ‖² for cores that are rounded with these steps."""
        squares = np.ones(len(self.members))
        step = np.where(np.isfinite(steps), steps, 1.0)[:, None, None]
        for module in fitted:
            M = module.triangles[0].T @ (np.rint(module.cores / step) * step) @ module.triangles[1]
            squares += np.sum(M * (M - 2 * module.projected), axis=(1, 2))
        return np.maximum(squares, 0.0)


def _integers(fitted: Sequence[_Rounded], joint: NDArray[np.int64], steps: Floats) -> Floats:
    """The integers of the cores of these members, those of all modules in a row."""
    rows = [np.rint(module.cores[joint] / steps[:, None, None]).reshape(joint.size, -1) for module in fitted]
    return np.hstack(rows)


def _worth(directions: LeadingDirections, price: float) -> LeadingDirections:
    """The directions whose energy is worth two bits for each of their numbers."""
    least = THRESHOLDS[0] * price * len(directions.columns)
    return directions.head(int(np.count_nonzero(directions.energies >= least)))


def _round_side(directions: LeadingDirections, price: float) -> CodedColumns:
    worth = directions.energies / (price * max(1, len(directions.columns)))
    bits = 1 + np.searchsorted(THRESHOLDS, worth, side="right")
    return round_columns(directions.columns, np.clip(bits, 2, 8))


def _again(sides: Sequence[tuple[Floats, Floats]], other: LeadingDirections, k: int) -> LeadingDirections:
    """The k leading directions of the first sides, after the second sides were projected onto ``other``."""
    # ΔW V has the same left directions as left · Tᵀ, where T is the triangle of Vᵀ right.
    triangles = [np.asarray(np.linalg.qr(other.columns.T @ second, mode="r")) for _, second in sides]
    stacks = [first @ triangle.T for (first, _), triangle in zip(sides, triangles, strict=True)]
    return leading_directions(np.hstack(stacks)).head(k)
