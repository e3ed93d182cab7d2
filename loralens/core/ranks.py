"""Choosing the ranks of all modules from their spectra: rules for single modules, and budgets for all together."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import Literal, final

import numpy as np

from loralens.core.budgets import Chosen, Item, Items, total_cost, within
from loralens.core.lazy import Array
from loralens.core.names import weight_name
from loralens.core.structured import Updates
from loralens.errors import OptionError
from loralens.linalg.measures import EPS, energy_rank

RuleName = Literal["rank", "energy", "error", "sv-ratio", "parameters", "bytes"]
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
        ‖ΔW−ΔW'‖_F/‖ΔW‖_F, in [0, 1)) or ``sv-ratio`` (σ_i > σ_1/value, value at least 1). For all modules together:
        ``parameters`` or ``bytes``.

    Raises
    ------
    OptionError
        There is no such rule, or the value is not allowed for it.
    """

    name: RuleName
    value: float

    def __post_init__(self) -> None:
        # Comparisons are written so that NaN fails all of them.
        wrong_by_name = {
            "rank": not (self.value >= 1 and float(self.value).is_integer()) and "a whole number from 1",
            "energy": not 0 < self.value <= 1 and "a fraction in (0, 1]",
            "error": not 0 <= self.value < 1 and "a relative error in [0, 1)",
            "sv-ratio": not self.value >= 1 and "a ratio from 1",
            "parameters": not 0 < self.value < inf and "a number above 0",
            "bytes": not 0 < self.value < inf and "a number above 0",
        }
        if self.name not in wrong_by_name:
            raise OptionError(f"{self.name!r} is not a rule", fix=f"choose one of {', '.join(wrong_by_name)}")
        wrong = wrong_by_name[self.name]
        if wrong:
            raise OptionError(f"{self.name} {self.value:g} is not {wrong}", fix=f"give {wrong}")

    @property
    def budget(self) -> bool:
        """Whether the rule is a budget for all modules together."""
        return self.name in BUDGETS

    def rank_of(self, s: Array) -> int:
        """The rank for one module with the nonzero singular values ``s``, largest first; 0 if there are none.

        Comparisons of tails have a tolerance of two roundings. sd-scripts keeps one direction more than its criterion
        requires (and more than one if ``s`` is flat); here the criterion is applied exactly.
        """
        if not s.size:
            return 0
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
        assert self.name == "sv-ratio", self.name
        return max(1, int(np.count_nonzero(s > s[0] / self.value)))


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
    """Choose the rank of every module.

    Parameters
    ----------
    spectra : mapping of str to float64 array
        Module name → the nonzero singular values of ΔW or of the whitened ΔW, largest first.
    costs : mapping of str to int
        Module name → parameters or bytes of one direction.
    rule : Rule
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
        Module name → the width of its factors, which limits the rank under ``one_rank``. Otherwise the number of
        singular values limits it.
    size : callable, optional
        For budgets: the exact size of ranks. The default is Σ rank·cost.

    Raises
    ------
    OptionError
        Not even the smallest ranks are within the budget.
    """
    items = rank_items(spectra, costs, shared=shared, weights=weights, least=least, one_rank=one_rank, widths=widths)
    return ranks_from_items(items, rule, spectra, one_rank=one_rank, size=size)


def ranks_from_items(
    items: Sequence[Item],
    rule: Rule,
    spectra: Mapping[str, Array],
    *,
    one_rank: bool = False,
    size: Callable[[Mapping[str, int]], int] | None = None,
) -> dict[str, int]:
    """As `ranks`, from the items that `rank_items` makes; for choosing by many rules."""
    if rule.budget:

        def measure(chosen: Chosen) -> int:
            return size(_by_module(items, chosen)) if size else total_cost(items, chosen)

        chosen = within(items, int(rule.value), measure, one_rank=one_rank, unit=rule.name)
        return _by_module(items, chosen, order=spectra)
    items = Items.of(items)
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
) -> Items:
    """An `Item` for every module, or for every group of modules that share a rank; parameters as for `ranks`."""
    shared, weights = shared or {}, weights or {}
    floors = {name: least if isinstance(least, int) else least[name] for name in spectra}
    # One rank for all may exceed the directions of some modules; these are padded with zeros up to their width.
    tops = {name: widths[name] if widths and one_rank else s.size for name, s in spectra.items()}
    groups: dict[str, list[str]] = {}
    for name in spectra:
        groups.setdefault(shared.get(name, name), []).append(name)
    items, energy = [], energies(spectra)
    for names in groups.values():
        if len(names) == 1:
            (name,) = names
            gains = weights[name] * energy[name] if name in weights else energy[name]
            items.append(Item((name,), gains, costs[name], floors[name], max(floors[name], tops[name])))
            continue
        gains = np.zeros(max(spectra[name].size for name in names))
        for name in names:
            gains[: spectra[name].size] += weights.get(name, 1.0) * energy[name]
        cost, least = sum(costs[name] for name in names), max(floors[name] for name in names)
        items.append(Item(tuple(names), gains, cost, least, max(least, *(tops[name] for name in names))))
    return Items(items)


def _by_module(items: Sequence[Item], chosen: Chosen, order: Mapping[str, object] | None = None) -> dict[str, int]:
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
