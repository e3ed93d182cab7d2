"""Whether two adapters are copies: the same update up to rounding, with the same other tensors, of the same step."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, final

import numpy as np

from loralens.analysis.equality import differences
from loralens.core.adapter import Adapter, Extra
from loralens.core.fingerprint import LEFT_OUT
from loralens.core.names import normal_form
from loralens.core.together import BOUND
from loralens.fleet.catalogue.members import Member
from loralens.fleet.levels import COPY, COPY_NORM, SAME
from loralens.fleet.search.inner import ExactUpdate, exact_cosine
from loralens.formats.records.training import checkpoint_step

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


def judge_sameness(
    first: Adapter,
    second: Adapter,
    updates: tuple[ExactUpdate, ExactUpdate],
    *,
    steps: tuple[Collection[int], Collection[int]] = ((), ()),
) -> Sameness:
    """Compare two adapters exactly, module by module, and their other tensors.

    Parameters
    ----------
    first, second : Adapter
        Two adapters whose fingerprints differ.
    updates : pair of ExactUpdate
        Their updates.
    steps : pair of collections of int
        The training steps of both, and of files with the same numbers; empty if they are unknown. Two steps are two
        adapters, however little training has changed between them.

    Raises
    ------
    FormatError
        A module holds NaN or Inf.
    """
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


def known_steps(members: Iterable[Member], fingerprint: str) -> set[int]:
    """The training steps of the members with this fingerprint, as their paths or the states of their trainers say.

    A final adapter has no step in its name, but the last checkpoint of its run has the same numbers.
    """
    steps = (checkpoint_step(member.path) for member in members if member.fingerprint == fingerprint)
    return {step for step in steps if step is not None}


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
