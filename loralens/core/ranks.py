"""All spectra → all ranks: rules that look at one module, and budgets that look at all of them."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal, final

import numpy as np

from loralens.core.lazy import Array
from loralens.core.names import weight_name
from loralens.core.structured import Updates
from loralens.errors import OptionError
from loralens.linalg.measures import EPS, energy_rank

RuleName = Literal["rank", "energy", "error", "sv-ratio", "parameters", "bytes"]
BUDGETS = ("parameters", "bytes")

_ATTENTION = re.compile(r"\.(in_proj_weight|out_proj)$")


@final
@dataclass(frozen=True, slots=True)
class Rule:
    """How ranks are chosen: what is asked for, and how much of it.

    Attributes
    ----------
    name : str
        For each module: ``rank`` (so many directions), ``energy`` (a fraction of Σσ², in (0, 1]), ``error`` (of
        ‖ΔW−ΔW'‖_F/‖ΔW‖_F, in [0, 1)) or ``sv-ratio`` (σ_i > σ_1/value, at least 1). For all together: ``parameters``
        or ``bytes``.
    value : float

    Raises
    ------
    OptionError
        There is no such rule, or it makes no sense with this value.
    """

    name: RuleName
    value: float

    def __post_init__(self) -> None:
        wrong_by_name = {
            "rank": not (self.value >= 1 and float(self.value).is_integer()) and "a whole number from 1",
            "energy": not 0 < self.value <= 1 and "a fraction in (0, 1]",
            "error": not 0 <= self.value < 1 and "a relative error in [0, 1)",
            "sv-ratio": not self.value >= 1 and "a ratio from 1",
            "parameters": not 0 < self.value < inf and "a number above 0",
            "bytes": not 0 < self.value < inf and "a number above 0",
        }
        if self.name not in wrong_by_name:
            raise OptionError(f"{self.name!r} is no rule", fix=f"choose one of {', '.join(wrong_by_name)}")
        wrong = wrong_by_name[self.name]
        if wrong:
            raise OptionError(f"{self.name} {self.value:g} is not {wrong}", fix=f"give {wrong}")

    @property
    def budget(self) -> bool:
        """Whether it looks at all modules together."""
        return self.name in BUDGETS

    def rank_of(self, s: Array) -> int:
        """The rank for one module of nonzero singular values ``s``, largest first; 0 for none.

        Two roundings are forgiven where a tail is compared. sd-scripts keeps one direction more than its criterion
        asks (and more than one where ``s`` is flat); here the criterion is what it says.
        """
        if not s.size:
            return 0
        if self.name == "rank":
            return min(int(self.value), s.size)
        if self.name == "energy":
            return energy_rank(s, self.value)
        if self.name == "error":
            # Relative to σ_1, so that squares neither over- nor underflow.
            tails = ((s / s[0]) ** 2)[::-1].cumsum()[::-1]  # tails[k] is lost if k values are kept
            return max(1, int(np.count_nonzero(tails > self.value**2 * (1 + 2 * EPS) * tails[0])))
        assert self.name == "sv-ratio", self.name
        return max(1, int(np.count_nonzero(s > s[0] / self.value)))


@final
@dataclass(frozen=True, slots=True)
class Item:
    """One decision: the rank of a module, or of several whose factors are stored in one tensor.

    Attributes
    ----------
    names : tuple of str
    gains : float64 array, shape (k,)
        What each direction saves of the error that the budget looks at, falling: Σ w·σ_i² over the modules, in any
        one unit.
    cost : int
        Parameters or bytes of one direction.
    least : int
        Directions kept in any case.
    most : int
        Directions there are.
    """

    names: tuple[str, ...]
    gains: Array
    cost: int
    least: int
    most: int

    def gain(self, rank: int) -> float:
        """What ``rank`` directions save."""
        return float(self.gains[:rank].sum())

    def clipped(self, rank: int) -> int:
        """``rank`` within what this item can have."""
        return min(max(rank, self.least), self.most)


Chosen = Sequence[int]  # one rank an item


def cost_of(items: Sequence[Item], chosen: Chosen) -> int:
    """What these ranks cost together."""
    return sum(item.cost * rank for item, rank in zip(items, chosen, strict=True))


def gain_of(items: Sequence[Item], chosen: Chosen) -> float:
    """What these ranks save together."""
    return sum(item.gain(rank) for item, rank in zip(items, chosen, strict=True))


def uniform(items: Sequence[Item], rank: int) -> list[int]:
    """One rank for all, as far as each goes."""
    return [item.clipped(rank) for item in items]


def _highest(items: Sequence[Item]) -> int:
    """The most directions that any item has."""
    return max((item.most for item in items), default=0)


def allocate(items: Sequence[Item], capacity: int) -> list[int]:
    """The ranks that save most within ``capacity``, the least ones where not even they fit.

    Directions by gain per cost while they fit; the first that does not ends its item, the others go on. Then the
    better of that and every uniform rank that fits, and what is left is filled again. So it is never worse than
    uniform, optimal where all costs are equal, and nowhere further from the optimum than one direction saves: up to
    the first direction that does not fit, greedy is the linear relaxation.
    """
    candidates = [_fill(items, uniform(items, 0), capacity)]
    # Greedy alone may be caught by a large direction early on; a uniform choice protects against that.
    for rank in range(_highest(items), 0, -1):
        chosen = uniform(items, rank)
        if cost_of(items, chosen) <= capacity:  # a higher one that fits saves more than any lower one
            candidates.append(_fill(items, chosen, capacity))
            break
    return max(candidates, key=lambda chosen: gain_of(items, chosen))  # the first of equals: greedy


def _fill(items: Sequence[Item], start: Chosen, capacity: int) -> list[int]:
    """``start`` and, by gain per cost, every direction that still fits; those that save nothing are left out."""
    chosen = list(start)
    remaining = capacity - cost_of(items, chosen)
    open_ = [item.gains[rank : item.most] / item.cost for item, rank in zip(items, chosen, strict=True)]
    which = np.repeat(np.arange(len(items)), [one.size for one in open_])
    worth = np.concatenate([*open_, np.zeros(0)])
    ended: set[int] = set()
    for j in np.argsort(-worth, kind="stable"):
        i = int(which[j])
        # Sorted: all that follow save nothing either.
        if worth[j] <= 0:
            break
        # A later direction of the item must not be taken without this one.
        if i in ended or items[i].cost > remaining:
            ended.add(i)
            continue
        chosen[i] += 1
        remaining -= items[i].cost
    return chosen


def within(
    items: Sequence[Item], budget: int, size: Callable[[Chosen], int], *, one_rank: bool = False, unit: str = ""
) -> list[int]:
    """The ranks that save most while ``size`` of them is at most ``budget``.

    Parameters
    ----------
    size : callable
        The exact size of a choice. Nearly linear in it: a file has a header whose length hangs on the digits in it,
        and what is kept whole may take less.
    one_rank : bool
        Only uniform choices: the highest that fits.
    unit : str
        Of the budget, for a message.

    Raises
    ------
    OptionError
        Not even the least ranks fit; the message says what they take.

    Notes
    -----
    No direction that saves anything fits into what is left over.
    """
    least = uniform(items, 0)
    needed = size(least)
    if needed > budget:
        what = "rank 1 everywhere" if any(least) else "what stays as it is"
        raise OptionError(f"{budget:,} {unit} are too few", fix=f"give at least {needed:,} {unit}: {what}")
    if one_rank:
        return _highest_uniform(items, budget, size)
    most = uniform(items, _highest(items))
    # Everything fits, so nothing has to be chosen.
    if size(most) <= budget:
        return most
    capacity, chosen = budget - needed + cost_of(items, least), least
    while capacity > cost_of(items, least):
        trial = allocate(items, capacity)
        excess = size(trial) - budget
        if excess <= 0:
            chosen = trial
            break
        # The size is nearly linear, so subtracting the excess converges in a few rounds.
        capacity -= excess
    return _top_up(items, chosen, budget, size)


def _highest_uniform(items: Sequence[Item], budget: int, size: Callable[[Chosen], int]) -> list[int]:
    """The highest uniform choice whose size is within the budget; that of rank 0, the least ranks, always is."""
    low, high = 0, _highest(items)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(uniform(items, middle)) <= budget else (low, middle - 1)
    return uniform(items, low)


def _top_up(items: Sequence[Item], chosen: list[int], budget: int, size: Callable[[Chosen], int]) -> list[int]:
    """``chosen`` and single directions more, by gain per cost, while the exact size allows it."""
    remaining = budget - size(chosen)
    ended: set[int] = set()
    while True:
        worth = {
            i: item.gains[rank] / item.cost
            for i, (item, rank) in enumerate(zip(items, chosen, strict=True))
            if i not in ended
            and rank < min(item.most, item.gains.size)
            and item.cost <= remaining
            and item.gains[rank] > 0
        }
        if not worth:
            return chosen
        best = max(worth, key=worth.__getitem__)
        trial = [rank + (i == best) for i, rank in enumerate(chosen)]
        if size(trial) <= budget:
            chosen, remaining = trial, budget - size(trial)
        else:
            ended.add(best)


def ranks(
    spectra: Mapping[str, Array],
    costs: Mapping[str, int],
    rule: Rule,
    *,
    shared: Mapping[str, str] | None = None,
    weights: Mapping[str, float] | None = None,
    least: int | Mapping[str, int] = 1,
    one_rank: bool = False,
    widths: Mapping[str, int] | None = None,
    size: Callable[[Mapping[str, int]], int] | None = None,
) -> dict[str, int]:
    """The rank of every module.

    Parameters
    ----------
    spectra : mapping of str to float64 array
        Module name → its nonzero singular values, largest first: of ΔW, or whitened.
    costs : mapping of str to int
        Module name → parameters or bytes of one direction.
    rule : Rule
    shared : mapping of str to str, optional
        Module name → the group that shares one rank: the experts of a stack. The highest that any member needs, or
        one decision of a budget.
    weights : mapping of str to float, optional
        What a budget multiplies σ² of a module with; 1 where absent.
    least : int or mapping of str to int
        1, or 0 where a module may go altogether: one without directions always has ``least``.
    one_rank : bool
        The same rank for all modules: the highest that any needs, or that the budget allows.
    widths : mapping of str to int, optional
        Module name → how wide its factors are, which bounds the rank that ``one_rank`` gives it. Without it, and
        without ``one_rank``, the number of its singular values does.
    size : callable, optional
        For budgets: what ranks really cost; else Σ rank·cost.

    Raises
    ------
    OptionError
        A budget that not even the least ranks keep.
    """
    floors = {name: least if isinstance(least, int) else least[name] for name in spectra}
    tops = {name: widths[name] if widths and one_rank else s.size for name, s in spectra.items()}
    items = _items(spectra, costs, shared or {}, weights or {}, floors, tops)
    if rule.budget:
        exact = size or (lambda chosen: sum(costs[name] * rank for name, rank in chosen.items()))
        chosen = within(
            items, int(rule.value), lambda c: exact(_by_module(items, c)), one_rank=one_rank, unit=rule.name
        )
        return _by_module(items, chosen, order=spectra)
    needed = [max(rule.rank_of(spectra[name]) for name in item.names) for item in items]
    if one_rank:
        needed = [max(needed, default=0)] * len(items)
    return _by_module(items, [item.clipped(rank) for item, rank in zip(items, needed, strict=True)], order=spectra)


def energies(spectra: Mapping[str, Array]) -> dict[str, Array]:
    """Module name → σ² of its directions, in units of the largest of all: nothing over- or underflows that counts."""
    # One unit for all modules, since their energies are compared.
    top = max((float(s[0]) for s in spectra.values() if s.size), default=0.0)
    return {name: (s / (top or 1.0)) ** 2 for name, s in spectra.items()}


def _items(
    spectra: Mapping[str, Array],
    costs: Mapping[str, int],
    shared: Mapping[str, str],
    weights: Mapping[str, float],
    floors: Mapping[str, int],
    tops: Mapping[str, int],
) -> list[Item]:
    """One decision for every module, or for every group of those that share a rank."""
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
    return items


def _by_module(items: Sequence[Item], chosen: Chosen, order: Mapping[str, object] | None = None) -> dict[str, int]:
    """Module name → its rank, in the order of the items or in another."""
    rank_of = {name: rank for item, rank in zip(items, chosen, strict=True) for name in item.names}
    return rank_of if order is None else {name: rank_of[name] for name in order}


def shared_ranks(modules: Updates) -> dict[str, str]:
    """Module name → the group whose modules can only have one rank together; modules of their own are left out.

    The experts of a stack stand in one tensor. Of an nn.MultiheadAttention PEFT adapts both projections with one r.
    """
    groups = {name: weight_name(name) for name, module in modules.items() if module.layout.kind == "experts"}
    for name in modules:
        parent = _ATTENTION.sub("", name)
        if parent != name and {f"{parent}.in_proj_weight", f"{parent}.out_proj"} <= set(modules):
            groups[name] = parent
    return groups
