"""All spectra → rank and bits of all modules in one decision: reverse water-filling over directions.

A direction of b bits takes 9 + ⌈out·b/8⌉ + ⌈in·b/8⌉ bytes and leaves σ²·ε_b of its energy as error; left out, it takes
nothing and leaves σ². Each bit more divides ε_b by about 3.7, so the best bits of a direction grow with log σ, and
directions below the water are left out: that is the rank. Each step to the next point of the lower convex hull of
(bytes, error) is taken in the order of error saved per byte, over all modules at once, until the budget is used up.

ε_b is what Gaussian numbers lose (`loralens.linalg.quantise.expected_noise`). Up to 8 bits the error found on real
adapters is 0.7 to 1.1 times the one expected here (above 1 where factors have outliers), at 16 bits half of it or
less. The one that counts is measured on the result (`loralens.compression.loss.losses`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple, final

import numpy as np

from loralens.core.lazy import Array
from loralens.core.quantised import direction_bytes
from loralens.core.ranks import energies
from loralens.errors import OptionError
from loralens.linalg.packing import FEWEST, MOST
from loralens.linalg.quantise import expected_noise

Shape = tuple[int, int]
Bits = Mapping[str, tuple[int, ...]]
LEVELS = (0, *range(FEWEST, MOST + 1))


@final
@dataclass(frozen=True, slots=True)
class Allocation:
    """Rank and bits of every module.

    Attributes
    ----------
    bits : mapping of str to tuple of int
        Bits of each direction that is kept, largest first; as many as the module's new rank. Empty: none is left.
    nbytes : int
        What they take: all of the file if ``size`` was given, else the directions alone.
    error : float
        ‖ΔW − ΔW'‖_F / ‖ΔW‖_F to be expected of all modules together, unweighted; 0 where ΔW = 0.
    """

    bits: Bits
    nbytes: int
    error: float


@final
@dataclass(frozen=True, slots=True)
class Tradeoff:
    """Every point that `allocate` passes as the budget grows.

    Attributes
    ----------
    nbytes : int64 array, shape (n,)
        Of the directions alone, growing.
    error : float64 array, shape (n,)
        ‖ΔW − ΔW'‖_F / ‖ΔW‖_F to be expected, falling where no weights are given.
    """

    nbytes: Array
    error: Array


def allocate(
    spectra: Mapping[str, Array],
    shapes: Mapping[str, Shape],
    budget: int,
    *,
    weights: Mapping[str, float] | None = None,
    shared: Mapping[str, str] | None = None,
    least: int | Mapping[str, int] = 1,
    size: Callable[[Bits], int] | None = None,
) -> Allocation:
    """The ranks and bits that lose least within a budget of bytes.

    Parameters
    ----------
    spectra : mapping of str to float64 array
        Module name → singular values of ΔW, largest first, at most min(r, out, in) of them.
    shapes : mapping of str to (out, in)
    budget : int
        Bytes.
    weights : mapping of str to float, optional
        What σ² of a module is multiplied with; 1 where absent.
    shared : mapping of str to str, optional
        Module name → the group whose modules have the same bits: the experts of a stack.
    least : int or mapping of str to int
        1: a module keeps a direction even if it does nothing; 0: it may go altogether.
    size : callable, optional
        What such bits really take, header included (`loralens.formats.dialects.sizes.file_size`), where the budget
        is one of a file.

    Returns
    -------
    Allocation

    Raises
    ------
    OptionError
        A budget that one direction of the fewest bits for each module exceeds.

    Notes
    -----
    Of its relaxation the choice is optimal, so it is at most one step of one direction behind the best one there is.
    Rank alone is one of the choices but for the numbers' own rounding, 8e-5 of ‖ΔW‖ at 16 bits and 9 bytes a direction.
    """
    ladder = _Ladder.of(spectra, shapes, weights or {}, shared or {}, least)
    exact = size or (lambda bits: sum(direction_bytes(shapes[n], b) for n, each in bits.items() for b in each))
    floor = ladder.taken(0)
    needed = exact(ladder.bits(floor))
    if needed > budget:
        what = f"a budget of {budget:,} bytes is too small"
        raise OptionError(what, fix=f"give at least {needed:,}: one direction of few bits for each module")
    chosen, capacity = floor, budget - needed + ladder.cost(floor)
    while capacity > ladder.cost(floor):
        trial = ladder.taken(capacity)
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
    least: int | Mapping[str, int] = 1,
) -> Tradeoff:
    """Bytes against error of every step, for a curve; parameters as `allocate`.

    Points between the steps that `allocate` finds for a budget are no better than these by more than one step.
    """
    ladder = _Ladder.of(spectra, shapes, weights or {}, shared or {}, least)
    total = sum(float(energy.sum()) for energy in energies(spectra).values())
    remaining = np.maximum(total - np.cumsum(ladder.energy), 0.0)
    start = ladder.forced
    nbytes, errors = np.cumsum(ladder.costs), np.sqrt(remaining / total) if total else np.zeros(remaining.size)
    first = max(start - 1, 0)
    return Tradeoff(nbytes[first:], errors[first:])


def expected_error(spectra: Mapping[str, Array], bits: Mapping[str, Sequence[int]]) -> float:
    """‖ΔW − ΔW'‖_F / ‖ΔW‖_F to expect of these bits: √(Σ σ²·ε_b / Σ σ²), ε = 1 where there are none."""
    lost = total = 0.0
    for name, energy in energies(spectra).items():
        noise = np.ones(energy.size)
        module_bits = bits.get(name, ())[: energy.size]
        noise[: len(module_bits)] = [expected_noise(b) for b in module_bits]
        lost, total = lost + float(energy @ noise), total + float(energy.sum())
    return sqrt(lost / total) if total else 0.0


class _Hull(NamedTuple):
    """The lower convex hull of bytes against noise: no bits first, then those worth having, growing."""

    bits: Array
    costs: Array  # bytes of a direction
    noise: Array  # of its σ²


class _Group(NamedTuple):
    """Modules that have the same bits: their names and what their directions hold."""

    names: tuple[str, ...]
    gains: Array  # w·σ², summed over the modules, in units of the largest σ² of all
    energy: Array  # σ², summed over the modules, in the same units
    free: _Hull
    floored: _Hull  # of a direction that has the fewest bits in any case
    forced: int  # how many have: the first ones


@final
@dataclass(frozen=True, slots=True)
class _Ladder:
    """Every step of every direction to its next bits, in the order of error saved per byte; the forced ones first."""

    groups: Sequence[_Group]
    costs: Array  # bytes of each step
    energy: Array  # unweighted energy that each step saves
    which: Array  # the group, the direction and the bits that each step leads to, shape (n, 3)
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
        groups = _groups(spectra, shapes, weights, shared, least)
        parts = []
        for g, group in enumerate(groups):
            count = group.gains.size
            for hull, first, stop in ((group.floored, 0, group.forced), (group.free, group.forced, count)):
                step, direction = np.indices((hull.costs.size - 1, stop - first)).reshape(2, -1)
                direction = direction + first
                cost, saved = np.diff(hull.costs)[step], -np.diff(hull.noise)[step]
                worth = group.gains[direction] * saved / cost
                worth[(step == 0) & (direction < group.forced)] = np.inf
                energy = group.energy[direction] * saved
                parts.append(np.stack([worth, cost, energy, np.full(step.size, g), direction, hull.bits[step + 1]]))
        table = np.concatenate(parts, axis=1) if parts else np.zeros((6, 0))
        table = table[:, table[0] > 0]
        table = table[:, np.argsort(-table[0], kind="stable")]
        worth, costs, energy = table[:3]
        return cls(groups, costs.astype(np.int64), energy, table[3:].T.astype(np.int64), int(np.isinf(worth).sum()))

    def cost(self, taken: Array) -> int:
        """Bytes of these steps."""
        return int(self.costs[taken].sum())

    def taken(self, capacity: int) -> Array:
        """Steps taken within a capacity: the forced ones, and in order all that still fit."""
        reached = max(self.forced, int(np.searchsorted(np.cumsum(self.costs), capacity, side="right")))
        taken = np.zeros(self.costs.size, bool)
        taken[:reached] = True
        remaining, least = (
            capacity - int(self.costs[:reached].sum()),
            self.costs[reached:].min(initial=np.iinfo(int).max),
        )
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


def _groups(
    spectra: Mapping[str, Array],
    shapes: Mapping[str, Shape],
    weights: Mapping[str, float],
    shared: Mapping[str, str],
    least: int | Mapping[str, int],
) -> list[_Group]:
    members: dict[str, list[str]] = {}
    for name in spectra:
        members.setdefault(shared.get(name, name), []).append(name)
    groups, own = [], energies(spectra)
    for names in members.values():
        width = max(1, *(spectra[name].size for name in names))
        energy, gains = np.zeros(width), np.zeros(width)
        for name in names:
            energy[: spectra[name].size] += own[name]
            gains[: spectra[name].size] += weights.get(name, 1.0) * own[name]
        group_shapes = [shapes[name] for name in names]
        forced = max(least if isinstance(least, int) else least[name] for name in names)
        groups.append(
            _Group(tuple(names), gains, energy, _hull(group_shapes), _hull(group_shapes, floored=True), forced)
        )
    return groups


def _hull(shapes: Sequence[Shape], *, floored: bool = False) -> _Hull:
    """The bits worth having of directions of these shapes; if ``floored``, the fewest are among them."""
    points = [(sum(direction_bytes(shape, b) for shape in shapes), expected_noise(b), b) for b in LEVELS]
    fixed = 2 if floored else 1
    hull = points[:fixed]
    for point in points[fixed:]:
        if hull[-1][0] == point[0]:  # less noise in as many bytes
            hull.pop()
        while len(hull) > fixed and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    costs, noise, bits = (np.array(column) for column in zip(*hull, strict=True))
    return _Hull(bits, costs, noise)


def _above(first: tuple[int, float, int], middle: tuple[int, float, int], last: tuple[int, float, int]) -> bool:
    """Whether the middle point lies on or above the line through the others."""
    return (first[1] - middle[1]) * (last[0] - first[0]) <= (first[1] - last[1]) * (middle[0] - first[0])
