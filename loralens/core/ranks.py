"""Choosing the ranks of all modules from their spectra: rules for single modules, and budgets for all together."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from math import inf
from typing import Literal, Self, cast, final

import numpy as np

from loralens.core.lazy import Array
from loralens.core.names import weight_name
from loralens.core.structured import Updates
from loralens.errors import OptionError
from loralens.linalg.measures import EPS, energy_rank


@final
@dataclass(frozen=True, slots=True)
class Item:
    """One decision: the rank of a module, or the common rank of several modules that share a tensor.

    Attributes
    ----------
    names : tuple of str
        The modules.
    gains : float64 array, shape (k,)
        The squared error that each direction saves, largest first: Σ w·σ_i² over the modules, in any common unit.
    cost : int
        Parameters or bytes of one direction.
    least : int
        Smallest allowed rank.
    most : int
        Largest allowed rank.
    """

    names: tuple[str, ...]
    gains: Array
    cost: int
    least: int
    most: int


Chosen = Sequence[int]  # one rank for each item


@final
class Items(tuple[Item, ...]):
    """Items, and their numbers as arrays, which are made once for all choices."""

    @cached_property
    def costs(self) -> Array:
        """The cost of one direction of every item, int64."""
        return np.array([item.cost for item in self], dtype=np.int64)

    @cached_property
    def bounds(self) -> tuple[Array, Array]:
        """The smallest and the largest allowed rank of every item, int64."""
        pairs = np.array([(item.least, item.most) for item in self], dtype=np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    @cached_property
    def sizes(self) -> Array:
        """The number of gains of every item, int64."""
        return np.array([item.gains.size for item in self], dtype=np.int64)

    @cached_property
    def starts(self) -> Array:
        """The place of the first gain of every item in `per_cost`, int64."""
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def per_cost(self) -> Array:
        """The gain per cost of every direction of every item, one item after the other."""
        # `concatenate` refuses an empty list, so an empty array is added for the case of no items.
        gains = np.concatenate([*(item.gains for item in self), np.zeros(0)])
        return np.asarray(gains / np.repeat(self.costs, self.sizes), dtype=np.float64)

    @cached_property
    def worth(self) -> tuple[Array, Array]:
        """The item and the place in it of every direction that saves something, by falling gain per cost."""
        # Stable, so that equal directions are taken in the order of the modules on every machine.
        order = np.argsort(-self.per_cost, kind="stable")
        # The directions are sorted, so all that save nothing come last.
        order = order[: np.count_nonzero(self.per_cost > 0)]
        owners = np.repeat(np.arange(len(self)), self.sizes)[order]
        return owners, order - self.starts[owners]


def total_cost(items: Items, chosen: Chosen) -> int:
    """The total cost of these ranks."""
    return int(items.costs @ np.asarray(chosen, dtype=np.int64))


def total_gain(items: Items, chosen: Chosen) -> float:
    """The total squared error that these ranks save."""
    return sum(float(item.gains[:rank].sum()) for item, rank in zip(items, chosen, strict=True))


def uniform(items: Items, rank: int) -> list[int]:
    """The same rank for all items, limited to the range of each."""
    ranks: list[int] = np.clip(rank, *items.bounds).tolist()
    return ranks


def _highest(items: Items) -> int:
    """The largest rank that any item allows."""
    return max((item.most for item in items), default=0)


def allocate_ranks(items: Items, capacity: int) -> list[int]:
    """Choose the ranks that save most within ``capacity``; the smallest ranks if not even they fit.

    Directions are taken greedily, by gain per cost, while they fit. If the next direction of an item does not fit, no
    further direction of this item is taken, and the other items go on. The result is the better of this choice and the
    largest uniform choice that fits, filled up in the same way. So it is never worse than a uniform choice, and it is
    optimal if all costs are equal. It differs from the optimum by at most the gain of one direction, because up to the
    first direction that does not fit, the greedy choice solves the linear relaxation.
    """
    least, even = uniform(items, 0), _highest_uniform(items, capacity, partial(total_cost, items))
    # On a tie the first one, the greedy choice.
    return max((_fill(items, start, capacity) for start in (least, even)), key=partial(total_gain, items))


def _fill(items: Items, start: Chosen, capacity: int) -> list[int]:
    """``start`` and every further direction that fits, by gain per cost; directions that save nothing are left out."""
    remaining = capacity - total_cost(items, start)
    owners, places = items.worth
    ranks = np.asarray(start, dtype=np.int64)
    owners = owners[(places >= ranks[owners]) & (places < items.bounds[1][owners])]
    costs = items.costs[owners]
    # No more than all of them is ever taken, so a budget of any size fits into 64 bits.
    remaining = min(remaining, int(costs.sum()))
    # What does not fit once never fits again, and neither do later directions of its item, which cost the same.
    while (fits := costs <= remaining).any():
        owners, costs = owners[fits], costs[fits]
        totals = costs.cumsum()
        count = int(np.searchsorted(totals, remaining, side="right"))  # all up to the first that does not fit
        ranks = ranks + np.bincount(owners[:count], minlength=len(items))
        remaining -= int(totals[count - 1])
        owners, costs = owners[count:], costs[count:]
    chosen: list[int] = ranks.tolist()
    return chosen


def within(
    items: Items, budget: int, size: Callable[[Chosen], int], *, one_rank: bool = False, unit: str = ""
) -> list[int]:
    """Choose the ranks that save most while their ``size`` is at most ``budget``.

    Parameters
    ----------
    size : callable
        The exact size of a choice. It is nearly linear in the ranks: the length of the header of a file depends on its
        digits, and modules that are kept unchanged may be smaller.
    one_rank : bool
        Choose the largest uniform rank that fits.
    unit : str
        The unit of the budget, for the message.

    Raises
    ------
    OptionError
        Not even the smallest ranks fit. The message says what they need.

    Notes
    -----
    No further direction that saves something fits into the rest of the budget.
    """
    least = uniform(items, 0)
    needed = size(least)
    if needed > budget:
        what = "rank 1 everywhere" if any(least) else "everything that stays as it is needs that many"
        raise OptionError(f"{budget:,} {unit} are too few", fix=f"give at least {needed:,} {unit}: {what}")
    if one_rank:
        return _highest_uniform(items, budget, size)
    most = uniform(items, _highest(items))
    # Everything fits, so nothing has to be chosen.
    if size(most) <= budget:
        return most
    capacity, chosen = budget - needed + total_cost(items, least), least
    while capacity > total_cost(items, least):
        trial = allocate_ranks(items, capacity)
        excess = size(trial) - budget
        if excess <= 0:
            chosen = trial
            break
        # The size is nearly linear, so subtracting the excess converges in a few rounds.
        capacity -= excess
    return _top_up(items, chosen, budget, size)


def _highest_uniform(items: Items, budget: int, size: Callable[[Chosen], int]) -> list[int]:
    """The largest uniform choice within the budget, by bisection; that of rank 0 always fits."""
    low, high = 0, _highest(items)
    # `size` grows with the rank, so halving the range finds the largest rank that fits.
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(uniform(items, middle)) <= budget else (low, middle - 1)
    return uniform(items, low)


def _top_up(items: Items, chosen: list[int], budget: int, size: Callable[[Chosen], int]) -> list[int]:
    """``chosen`` and further single directions, by gain per cost, while the exact size is within the budget."""
    remaining = budget - size(chosen)
    going_on = np.ones(len(items), dtype=bool)
    most = np.minimum(items.bounds[1], items.sizes)
    # One direction at a time, because the exact size may jump where a header grows by a digit.
    while True:
        ranks = np.asarray(chosen, dtype=np.int64)
        able = np.flatnonzero(going_on & (ranks < most) & (items.costs <= remaining))
        worth = items.per_cost[items.starts[able] + ranks[able]]
        if not (worth > 0).any():
            return chosen
        best = int(able[np.argmax(worth)])  # the first of several
        trial = [*chosen[:best], chosen[best] + 1, *chosen[best + 1 :]]
        if size(trial) <= budget:
            chosen, remaining = trial, budget - size(trial)
        else:
            going_on[best] = False


RuleName = Literal["rank", "energy", "error", "sv-ratio", "sv-cumulative", "parameters", "bytes"]
BUDGETS = ("parameters", "bytes")
MOST = 1 << 62  # above every rank, and within an integer of 64 bits

_ATTENTION = re.compile(r"\.(in_proj_weight|out_proj)$")


@final
@dataclass(frozen=True, slots=True)
class Rule:
    """A rule for choosing ranks, with its value.

    Attributes
    ----------
    name : str
        For each module: ``rank`` (a number of directions), ``energy`` (a fraction of Σσ², in (0, 1]), ``error`` (of
        ‖ΔW−ΔW'‖_F/‖ΔW‖_F, in [0, 1)), ``sv-ratio`` (σ_i > σ_1/value, value at least 1) or ``sv-cumulative`` (a
        fraction of Σσ, in (0, 1]). For all modules together: ``parameters`` or ``bytes``.
    ceiling : int, optional
        The most directions of a module, whatever the rule would keep.

    Raises
    ------
    OptionError
        There is no such rule, or the value is not allowed for it.
    """

    name: RuleName
    value: float
    ceiling: int | None = None

    def __post_init__(self) -> None:
        if self.ceiling is not None:
            Rule("rank", self.ceiling)
        # Comparisons are written so that NaN fails all of them.
        wrong_by_name = {
            "rank": not (self.value >= 1 and float(self.value).is_integer()) and "a whole number from 1",
            "energy": not 0 < self.value <= 1 and "a fraction in (0, 1]",
            "error": not 0 <= self.value < 1 and "a relative error in [0, 1)",
            "sv-ratio": not self.value >= 1 and "a ratio from 1",
            "sv-cumulative": not 0 < self.value <= 1 and "a fraction in (0, 1]",
            "parameters": not 0 < self.value < inf and "a number above 0",
            "bytes": not 0 < self.value < inf and "a number above 0",
        }
        if self.name not in wrong_by_name:
            raise OptionError(f"{self.name!r} is not a rule", fix=f"choose one of {', '.join(wrong_by_name)}")
        wrong = wrong_by_name[self.name]
        if wrong:
            raise OptionError(f"{self.name} {self.value:g} is not {wrong}", fix=f"give {wrong}")

    @classmethod
    def of(cls, values: Mapping[str, float]) -> Self:
        """The rule in a mapping of names to values, in which ``rank`` beside another rule is its ceiling."""
        (name, value), *others = sorted(values.items(), key=lambda item: item[0] == "rank")
        return cls(cast("RuleName", name), value, *(int(ceiling) for _, ceiling in others))

    @property
    def values(self) -> dict[str, float]:
        """The mapping from which `of` makes the rule."""
        return {self.name: self.value, **({} if self.ceiling is None else {"rank": self.ceiling})}

    @property
    def budget(self) -> bool:
        """Whether the rule is a budget for all modules together."""
        return self.name in BUDGETS

    def rank_of(self, s: Array) -> int:
        """The rank for one module with the nonzero singular values ``s``, largest first; 0 if there are none.

        Comparisons of tails have a tolerance of two roundings. sd-scripts keeps one direction more than its criterion
        requires (and more than one if ``s`` is flat); here the criterion is applied exactly.
        """
        rank = self._rank_of(s) if s.size else 0
        return rank if self.ceiling is None else min(rank, self.ceiling)

    def _rank_of(self, s: Array) -> int:
        if self.name == "rank":
            # Directions with σ = 0 are not in `s`, so no rank counts them.
            return min(int(self.value), s.size)
        if self.name == "energy":
            return energy_rank(s, self.value)
        if self.name == "error":
            # Values are divided by σ_1, so that squares neither over- nor underflow.
            tails = ((s / s[0]) ** 2)[::-1].cumsum()[::-1]  # tails[k] is lost if k values are kept
            # 2ε forgives the rounding of the sums, so that exact decimal cases come out as on paper. At least 1 is
            # kept, because 0 would leave the module out.
            return max(1, int(np.count_nonzero(tails > self.value**2 * (1 + 2 * EPS) * tails[0])))
        if self.name == "sv-cumulative":
            return energy_rank(np.sqrt(s), self.value)  # the energy of √σ is Σσ
        assert self.name == "sv-ratio", self.name
        return max(1, int(np.count_nonzero(s > s[0] / self.value)))


def ranks_from_items(
    items: Items,
    rule: Rule,
    spectra: Mapping[str, Array],
    *,
    one_rank: bool = False,
    size: Callable[[Mapping[str, int]], int] | None = None,
) -> dict[str, int]:
    """Choose the rank of every module from the items that `rank_items` makes.

    ``size`` is for budgets: the exact size of ranks. The default is Σ rank·cost.

    Raises
    ------
    OptionError
        Not even the smallest ranks are within the budget.
    """
    if rule.budget:

        def measure(chosen: Chosen) -> int:
            return size(_by_module(items, chosen)) if size else total_cost(items, chosen)

        chosen = within(items, int(rule.value), measure, one_rank=one_rank, unit=rule.name)
        return _by_module(items, chosen, order=spectra)
    if rule.name == "rank":
        # As `Rule.rank_of` of every module, for all items at once.
        needed = np.minimum(int(min(rule.value, MOST)), items.sizes)
    else:
        needed = np.array([max(rule.rank_of(spectra[name]) for name in item.names) for item in items], dtype=np.int64)
    if one_rank:
        needed[:] = needed.max(initial=0)
    return _by_module(items, np.clip(needed, *items.bounds).tolist(), order=spectra)


def energies(spectra: Mapping[str, Array]) -> dict[str, Array]:
    """Module name → σ² of its directions, relative to the largest of all, so that no overflow is possible."""
    # One unit for all modules, since their energies are compared.
    top = max((float(s[0]) for s in spectra.values() if s.size), default=0.0)
    # All at once: there may be many thousands of modules with a few values each.
    squares = (np.concatenate([*spectra.values(), np.zeros(0)]) / (top or 1.0)) ** 2
    ends = accumulate(s.size for s in spectra.values())
    return {name: squares[end - s.size : end] for (name, s), end in zip(spectra.items(), ends, strict=True)}


def rank_items(
    spectra: Mapping[str, Array],
    costs: Mapping[str, int],
    *,
    shared: Mapping[str, str] | None = None,
    weights: Mapping[str, float] | None = None,
    least: int | Mapping[str, int] = 1,
    one_rank: bool = False,
    widths: Mapping[str, int] | None = None,
    ceiling: int | None = None,
) -> Items:
    """An `Item` for every module, or for every group of modules that share a rank.

    Parameters
    ----------
    spectra : mapping of str to float64 array
        Module name → the nonzero singular values of ΔW or of the whitened ΔW, largest first.
    costs : mapping of str to int
        Module name → parameters or bytes of one direction.
    shared : mapping of str to str, optional
        Module name → the group of modules with the same rank, such as the experts of a stack. A rule gives the group
        the largest rank that a member needs, and a budget decides for the group as a whole.
    weights : mapping of str to float, optional
        The weight of σ² of a module under a budget. The default is 1.
    least : int or mapping of str to int
        The smallest rank: 1, or 0 if a module may be left out. A module without directions always gets ``least``.
    one_rank : bool
        Give all modules the same rank: the largest that a module needs, or that the budget allows.
    widths : mapping of str to int, optional
        Module name → the width of its factors, the largest of which limits the rank under ``one_rank``. Otherwise the
        number of singular values of each module limits it.
    ceiling : int, optional
        The largest rank of any module.
    """
    shared, weights = shared or {}, weights or {}
    floors = {name: least if isinstance(least, int) else least[name] for name in spectra}
    # One rank for all may exceed the directions of some modules; these are padded with zeros.
    widest = max(widths.values(), default=0) if widths and one_rank else 0
    tops = {name: min(widest or s.size, ceiling or MOST) for name, s in spectra.items()}
    groups: dict[str, list[str]] = {}
    for name in spectra:
        groups.setdefault(shared.get(name, name), []).append(name)
    items, energy = [], energies(spectra)
    for names in groups.values():
        gains = np.zeros(max(spectra[name].size for name in names))
        for name in names:
            gains[: spectra[name].size] += weights.get(name, 1.0) * energy[name]
        cost, least = sum(costs[name] for name in names), max(floors[name] for name in names)
        items.append(Item(tuple(names), gains, cost, least, max(least, *(tops[name] for name in names))))
    return Items(items)


def _by_module(items: Items, chosen: Chosen, order: Mapping[str, object] | None = None) -> dict[str, int]:
    """Module name → rank, in the order of the items or of ``order``."""
    rank_of = {name: rank for item, rank in zip(items, chosen, strict=True) for name in item.names}
    return rank_of if order is None else {name: rank_of[name] for name in order}


def shared_ranks(modules: Updates) -> dict[str, str]:
    """Module name → the group of modules that must have the same rank; modules without a group are left out.

    The experts of a stack are in one tensor. PEFT adapts both projections of an nn.MultiheadAttention with one r.
    """
    groups = {name: weight_name(name) for name, module in modules.items() if module.layout.kind == "experts"}
    for name in modules:
        # Both projections have to be adapted, otherwise there is nothing to share.
        parent = _ATTENTION.sub("", name)
        if parent != name and {f"{parent}.in_proj_weight", f"{parent}.out_proj"} <= set(modules):
            groups[name] = parent
    return groups
