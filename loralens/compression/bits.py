"""Rank and bits of all modules, chosen together from their spectra by reverse water-filling over directions.

A direction stored in b bits takes 9 + ⌈out·b/8⌉ + ⌈in·b/8⌉ bytes and causes an error of σ²·ε_b. A direction that is
left out takes nothing and causes an error of σ². Every additional bit divides ε_b by about 3.7, so the best number of
bits grows with log σ. Directions below a certain σ, the water level, are not worth any bits; the others are the rank.
For every direction, the points (bytes, error) of all numbers of bits have a lower convex hull. The steps from one point
of a hull to the next are taken in the order of error saved per byte, over all modules, until the budget is used up.

ε_b is the error of quantised Gaussian numbers (`loralens.linalg.few_bits.quantise.expected_noise`). Measured on real
adapters, the error is 0.7 to 1.1 times the expected one up to 8 bits (above 1 where factors have outliers), and at most
half of it at 16 bits. Reported errors are therefore measured on the result (`loralens.compression.loss.losses`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple, final

import numpy as np

from loralens.core.few_bits.quantised import direction_bytes
from loralens.core.lazy import Array
from loralens.core.ranks import energies
from loralens.errors import OptionError
from loralens.linalg.few_bits.packing import FEWEST, MOST
from loralens.linalg.few_bits.quantise import expected_noise

Shape = tuple[int, int]
Bits = Mapping[str, tuple[int, ...]]
LEVELS = (0, *range(FEWEST, MOST + 1))  # bits that a direction can have; 0: it is left out


@final
@dataclass(frozen=True, slots=True)
class Allocation:
    """Rank and bits of every module.

    Attributes
    ----------
    bits : mapping of str to tuple of int
        Bits of every direction that is kept, largest first; their number is the new rank of the module.
    nbytes : int
        The size of the whole file if ``size`` was given, else of the directions alone.
    error : float
        Expected ‖ΔW − ΔW'‖_F / ‖ΔW‖_F of all modules together, unweighted; 0 where ΔW = 0.
    """

    bits: Bits
    nbytes: int
    error: float


@final
@dataclass(frozen=True, slots=True)
class Tradeoff:
    """Every point that `allocate_bits` passes as the budget grows.

    Attributes
    ----------
    nbytes : int64 array, shape (n,)
        Size of the directions alone, increasing.
    error : float64 array, shape (n,)
        Expected ‖ΔW − ΔW'‖_F / ‖ΔW‖_F; it decreases if no weights are given.
    """

    nbytes: Array
    error: Array


def allocate_bits(
    spectra: Mapping[str, Array],
    shapes: Mapping[str, Shape],
    budget: int,
    *,
    weights: Mapping[str, float] | None = None,
    shared: Mapping[str, str] | None = None,
    least: int | Mapping[str, int] = 1,
    size: Callable[[Bits], int] | None = None,
) -> Allocation:
    """The ranks and bits with the smallest error within a budget of bytes.

    Parameters
    ----------
    spectra : mapping of str to float64 array
        Module name → singular values of ΔW, largest first, at most min(r, out, in) of them.
    shapes : mapping of str to (out, in)
    budget : int
        In bytes.
    weights : mapping of str to float, optional
        Factor by which σ² of a module is multiplied; 1 where absent.
    shared : mapping of str to str, optional
        Module name → a group whose modules must have the same bits, such as the experts of a stack.
    least : int or mapping of str to int
        1: a module keeps at least one direction, even if it is 0. 0: the module may be left out.
    size : callable, optional
        Bits → size of the file, header included (`loralens.formats.dialects.sizes.file_size`). The budget then
        applies to the file.

    Returns
    -------
    Allocation

    Raises
    ------
    OptionError
        The budget is too small for one direction of the fewest bits in each module.

    Notes
    -----
    The choice is optimal for the continuous relaxation, so it is worse than the best one by at most one step of one
    direction. Plain truncation, all directions at 16 bits, is among the choices; it differs from stored 16-bit floats
    by 9 bytes a direction and a rounding error of 8e-5 of ‖ΔW‖.
    """
    ladder = _Ladder.of(spectra, shapes, weights or {}, shared or {}, least)
    exact = size or (lambda bits: sum(direction_bytes(shapes[n], b) for n, each in bits.items() for b in each))
    floor = ladder.steps_within(0)  # the forced steps alone
    needed = exact(ladder.bits(floor))
    if needed > budget:
        what = f"a budget of {budget:,} bytes is too small"
        raise OptionError(what, fix=f"give at least {needed:,}: one direction of few bits for each module")
    # The size of the file exceeds the sum of its directions by a header that depends on the bits. The capacity is
    # lowered by the bytes by which a trial exceeds the budget, until a trial fits; each round lowers it by 1 or more.
    chosen, capacity = floor, budget - needed + ladder.cost(floor)
    while capacity > ladder.cost(floor):  # at the floor, which fits, there is nothing left to take back
        trial = ladder.steps_within(capacity)
        excess = exact(ladder.bits(trial)) - budget
        if excess <= 0:
            chosen = trial
            break
        capacity -= excess
    bits = ladder.bits(chosen)
    return Allocation(bits, exact(bits), expected_error(spectra, bits))


def tradeoff(
    spectra: Mapping[str, Array],
    shapes: Mapping[str, Shape],
    *,
    weights: Mapping[str, float] | None = None,
    shared: Mapping[str, str] | None = None,
) -> Tradeoff:
    """Bytes and error after every step, for a curve. The parameters are those of `allocate_bits`.

    Every module keeps at least one direction. `allocate_bits` may find points between these for some budgets; they are
    better by at most one step.
    """
    ladder = _Ladder.of(spectra, shapes, weights or {}, shared or {}, 1)
    total = sum(float(energy.sum()) for energy in energies(spectra).values())
    remaining = np.maximum(total - np.cumsum(ladder.energy), 0.0)  # rounding may leave −1e-17 at the end
    errors = np.sqrt(remaining / total) if total else np.zeros(remaining.size)
    # All forced steps are taken first, so the curve begins after them.
    first = max(ladder.forced - 1, 0)
    return Tradeoff(np.cumsum(ladder.costs)[first:], errors[first:])


def expected_error(spectra: Mapping[str, Array], bits: Mapping[str, Sequence[int]]) -> float:
    """Expected ‖ΔW − ΔW'‖_F / ‖ΔW‖_F of these bits: √(Σ σ²·ε_b / Σ σ²), with ε = 1 for directions without bits."""
    lost = total = 0.0
    for name, energy in energies(spectra).items():
        noise = np.ones(energy.size)
        module_bits = bits.get(name, ())[: energy.size]
        noise[: len(module_bits)] = [expected_noise(b) for b in module_bits]
        lost, total = lost + float(energy @ noise), total + float(energy.sum())
    return sqrt(lost / total) if total else 0.0


class _Hull(NamedTuple):
    """The lower convex hull of noise over bytes, from no bits to the most; other numbers of bits are never best."""

    bits: Array
    costs: Array  # bytes of a direction
    noise: Array  # the error that remains, as a share of its σ²


class _Group(NamedTuple):
    """Modules that must have the same bits: their names, and the energy of their directions."""

    names: tuple[str, ...]
    gains: Array  # w·σ², summed over the modules, in units of the largest σ² of all
    energy: Array  # σ², summed over the modules, in the same units
    free: _Hull
    floored: _Hull  # the hull of a direction that must have at least the fewest bits
    forced: int  # the number of such directions; they are the first ones


@final
@dataclass(frozen=True, slots=True)
class _Ladder:
    """All steps of all directions to their next bits, by falling error saved per byte; forced steps come first."""

    groups: Sequence[_Group]
    costs: Array  # bytes of each step
    energy: Array  # unweighted energy that each step saves
    which: Array  # group, direction and new bits of each step, shape (n, 3)
    forced: int  # steps that are taken in any case

    @classmethod
    def of(
        cls,
        spectra: Mapping[str, Array],
        shapes: Mapping[str, Shape],
        weights: Mapping[str, float],
        shared: Mapping[str, str],
        least: int | Mapping[str, int],
    ) -> "_Ladder":
        members: dict[str, list[str]] = {}
        for name in spectra:
            members.setdefault(shared.get(name, name), []).append(name)
        groups, own = [], energies(spectra)
        for names in members.values():
            # Modules of one group may have fewer directions than others: the missing ones are 0.
            energy, gains = np.zeros((2, max(1, *(spectra[name].size for name in names))))
            for name in names:
                energy[: spectra[name].size] += own[name]
                gains[: spectra[name].size] += weights.get(name, 1.0) * own[name]
            group_shapes = [shapes[name] for name in names]
            free, floored = _hull(group_shapes, floored=False), _hull(group_shapes, floored=True)
            forced = max(least if isinstance(least, int) else least[name] for name in names)
            groups.append(_Group(tuple(names), gains, energy, free, floored, forced))
        parts = []
        for g, group in enumerate(groups):
            count = group.gains.size
            for hull, first, stop in ((group.floored, 0, group.forced), (group.free, group.forced, count)):
                step, direction = np.indices((hull.costs.size - 1, stop - first)).reshape(2, -1)
                direction = direction + first
                # Along a hull, the error saved per byte falls, so sorting keeps the steps of a direction in order.
                cost, saved = np.diff(hull.costs)[step], -np.diff(hull.noise)[step]
                worth = group.gains[direction] * saved / cost
                worth[(step == 0) & (direction < group.forced)] = np.inf  # sorts forced steps to the front
                energy = group.energy[direction] * saved
                parts.append(np.stack([worth, cost, energy, np.full(step.size, g), direction, hull.bits[step + 1]]))
        table = np.concatenate(parts, axis=1) if parts else np.zeros((6, 0))
        table = table[:, table[0] > 0]  # steps that save nothing belong to directions with σ = 0
        table = table[
            :, np.argsort(-table[0], kind="stable")
        ]  # stable: of equal steps, the earlier module's comes first
        worth, costs, energy = table[:3]
        return cls(groups, costs.astype(np.int64), energy, table[3:].T.astype(np.int64), int(np.isinf(worth).sum()))

    def cost(self, taken: Array) -> int:
        """Bytes of these steps."""
        return int(self.costs[taken].sum())

    def steps_within(self, capacity: int) -> Array:
        """The steps taken within a capacity: the forced ones, then in order all that still fit."""
        reached = max(self.forced, int(np.searchsorted(np.cumsum(self.costs), capacity, side="right")))
        taken = np.zeros(self.costs.size, bool)
        taken[:reached] = True
        remaining = capacity - int(self.costs[:reached].sum())
        least = self.costs[reached:].min(initial=np.iinfo(int).max)  # below it, no later step can fit
        # A direction whose next step does not fit takes no later one either: the steps of a hull build on each other.
        ended: set[tuple[int, int]] = set()
        for i in range(reached, self.costs.size):
            if remaining < least:
                break
            g, direction, _ = self.which[i].tolist()
            if (g, direction) in ended or self.costs[i] > remaining:
                ended.add((g, direction))
                continue
            taken[i] = True
            remaining -= int(self.costs[i])
        return taken

    def bits(self, taken: Array) -> dict[str, tuple[int, ...]]:
        """Bits of every direction after these steps, by module."""
        reached = [np.zeros(group.gains.size, np.int64) for group in self.groups]
        for g, direction, bits in self.which[taken]:
            reached[g][direction] = max(reached[g][direction], bits)
        result: dict[str, tuple[int, ...]] = {}
        for group, direction_bits in zip(self.groups, reached, strict=True):
            result.update(dict.fromkeys(group.names, tuple(direction_bits[direction_bits > 0].tolist())))
        return result


def _hull(shapes: Sequence[Shape], *, floored: bool) -> _Hull:
    """The hull of a direction over modules of these shapes. If ``floored``, the fewest bits always stay on it."""
    points = [(sum(direction_bytes(shape, b) for shape in shapes), expected_noise(b), b) for b in LEVELS]
    fixed = 2 if floored else 1
    hull = points[:fixed]
    for point in points[fixed:]:
        if hull[-1][0] == point[0]:  # more bits in as many bytes have less noise
            hull.pop()
        while len(hull) > fixed and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    costs, noise, bits = (np.array(column) for column in zip(*hull, strict=True))
    return _Hull(bits, costs, noise)


def _above(first: tuple[int, float, int], middle: tuple[int, float, int], last: tuple[int, float, int]) -> bool:
    """Whether the middle point lies on or above the line through the others."""
    # Slopes are compared by products, because a quotient would round.
    return (first[1] - middle[1]) * (last[0] - first[0]) <= (first[1] - last[1]) * (middle[0] - first[0])
