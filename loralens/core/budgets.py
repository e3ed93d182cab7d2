"""Choosing the ranks of all modules together, so that they save most within a budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self, final

import numpy as np

from loralens.core.lazy import Array
from loralens.errors import OptionError


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


class _Worth(NamedTuple):
    """Every direction that saves something, by falling gain per cost: its item, and its place in the item."""

    owners: Array
    places: Array


@final
class Items(tuple[Item, ...]):
    """Items, and their numbers as arrays, which are made once for all choices."""

    @classmethod
    def of(cls, items: Sequence[Item]) -> Self:
        """The items themselves if they are `Items` already."""
        return items if isinstance(items, cls) else cls(items)

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
    def saved(self) -> Array:
        """The squared error that every number of directions of every item saves, shape (items, most directions + 1)."""
        saved = np.zeros((len(self), int(self.sizes.max(initial=0)) + 1))
        for size in np.unique(self.sizes).tolist():
            own = np.flatnonzero(self.sizes == size)
            gains = np.array([self[i].gains for i in own.tolist()])
            for count in range(1, size + 1):
                saved[own, count] = np.add.reduce(gains[:, :count], axis=1)
        return saved

    @cached_property
    def worth(self) -> _Worth:
        """The directions in the order in which a budget takes them."""
        # Stable, so that equal directions are taken in the order of the modules on every machine.
        order = np.argsort(-self.per_cost, kind="stable")
        # The directions are sorted, so all that save nothing come last.
        order = order[: np.count_nonzero(self.per_cost > 0)]
        owners = np.repeat(np.arange(len(self)), self.sizes)[order]
        return _Worth(owners, order - self.starts[owners])


def total_cost(items: Sequence[Item], chosen: Chosen) -> int:
    """The total cost of these ranks."""
    return int(Items.of(items).costs @ np.asarray(chosen, dtype=np.int64))


def total_gain(items: Sequence[Item], chosen: Chosen) -> float:
    """The total squared error that these ranks save."""
    items = Items.of(items)
    if not items:
        return 0.0
    columns = np.minimum(chosen, items.sizes)
    total: float = sum(items.saved[np.arange(len(items)), columns].tolist())
    return total


def uniform(items: Sequence[Item], rank: int) -> list[int]:
    """The same rank for all items, limited to the range of each."""
    ranks: list[int] = np.clip(rank, *Items.of(items).bounds).tolist()
    return ranks


def _highest(items: Sequence[Item]) -> int:
    """The largest rank that any item allows."""
    return max((item.most for item in items), default=0)


def allocate_ranks(items: Sequence[Item], capacity: int) -> list[int]:
    """Choose the ranks that save most within ``capacity``; the smallest ranks if not even they fit.

    Directions are taken greedily, by gain per cost, while they fit. If the next direction of an item does not fit, no
    further direction of this item is taken, and the other items go on. The result is the better of this choice and the
    largest uniform choice that fits, filled up in the same way. So it is never worse than a uniform choice, and it is
    optimal if all costs are equal. It differs from the optimum by at most the gain of one direction, because up to the
    first direction that does not fit, the greedy choice solves the linear relaxation.
    """
    items = Items.of(items)
    candidates = [_fill(items, uniform(items, 0), capacity)]
    # So that the result is never worse than a uniform choice.
    for rank in range(_highest(items), 0, -1):
        chosen = uniform(items, rank)
        if total_cost(items, chosen) <= capacity:  # the largest rank that fits saves more than any smaller one
            candidates.append(_fill(items, chosen, capacity))
            break
    if all(candidate == candidates[0] for candidate in candidates):
        return candidates[0]
    return max(candidates, key=lambda chosen: total_gain(items, chosen))  # on a tie the first one, the greedy choice


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
    items: Sequence[Item], budget: int, size: Callable[[Chosen], int], *, one_rank: bool = False, unit: str = ""
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
    items = Items.of(items)
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


def _highest_uniform(items: Sequence[Item], budget: int, size: Callable[[Chosen], int]) -> list[int]:
    """The largest uniform choice within the budget, by bisection; that of rank 0 always fits."""
    low, high = 0, _highest(items)
    # `size` grows with the rank, so halving the range finds the largest rank that fits.
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(uniform(items, middle)) <= budget else (low, middle - 1)
    return uniform(items, low)


def _top_up(items: Sequence[Item], chosen: list[int], budget: int, size: Callable[[Chosen], int]) -> list[int]:
    """``chosen`` and further single directions, by gain per cost, while the exact size is within the budget."""
    items = Items.of(items)
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
