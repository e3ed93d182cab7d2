"""Matching the modules of several adapters, under the names of the first."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import DTypeLike

from loralens.core.adapter import Adapter
from loralens.core.joint import COMBINED
from loralens.core.lowrank import LowRank
from loralens.core.names import kind
from loralens.core.naming.matching import same_modules
from loralens.core.ranks import shared_ranks
from loralens.core.structured import Update
from loralens.errors import LEAVE_OUT, MismatchError, ShapeError, place

# None rather than a missing entry, so that a row has the order of the adapters.
Row = tuple[Update | None, ...]  # one module of every adapter; None where an adapter does not have it
LISTED = 4  # most kinds of an adapter that a message names


def match_modules(adapters: Sequence[Adapter], labels: Sequence[str]) -> dict[str, Row]:
    """Module name → the modules of all adapters, None where an adapter does not have it.

    The names are those of the first adapter that has the module. Names are matched exactly, or else by normal form.

    Raises
    ------
    MismatchError
        An adapter has no module in common with those before it.
    ShapeError
        A module has two shapes.
    """
    called = match_names(adapters, labels)
    rows = {
        name: tuple(None if own is None else adapter[own] for adapter, own in zip(adapters, names, strict=True))
        for name, names in called.items()
    }
    for name, row in rows.items():
        _check_shapes(name, row, labels)
    return rows


def match_names(adapters: Sequence[Adapter], labels: Sequence[str]) -> dict[str, tuple[str | None, ...]]:
    """Module name → its names in all adapters, None where an adapter does not have it (see `match_modules`)."""
    names: dict[str, list[str | None]] = {name: [name] for name in adapters[0]}
    for t, adapter in enumerate(adapters[1:], 1):
        same_names = same_modules(names, adapter)
        # No common module at all is nearly always a mistake in the choice of adapters.
        if not same_names:
            first, second = (f"{labels[i]} has {_describe(adapters[i])}" for i in (0, t))
            raise MismatchError(
                f"no module in common: {first}; {second}",
                fix="give adapters of one base model; loralens convert --base DIR puts names right",
            )
        for name, own in names.items():
            own.append(same_names.get(name))
        # Modules that no earlier adapter has get rows of their own, with None for all before.
        matched = set(same_names.values())
        names |= {name: [*[None] * t, name] for name in adapter if name not in matched}
    return {name: tuple(own) for name, own in names.items()}


def _describe(adapter: Adapter) -> str:
    """The number of modules of an adapter, its kinds and its first name, as text."""
    kinds = list(dict.fromkeys(map(kind, adapter)))
    shown = ", ".join(kinds[:LISTED]) + (" …" if len(kinds) > LISTED else "")
    return f"{len(adapter)} modules ({shown}), {next(iter(adapter), 'none')} first"


def _check_shapes(name: str, row: Sequence[Update | None], labels: Sequence[str]) -> None:
    shapes = {update.shape: label for update, label in zip(row, labels, strict=True) if update is not None}
    # Two of them are enough for the message: the first two shapes.
    if len(shapes) > 1:
        (shape, holder), (other_shape, other_holder), *_ = shapes.items()
        raise ShapeError(
            f"{name} is {shape[0]} × {shape[1]} in {holder} and "
            f"{other_shape[0]} × {other_shape[1]} in {other_holder}: they belong to two base models",
            fix="give adapters of one base model",
        )


def check_combinable(name: str, row: Row, labels: Sequence[str]) -> None:
    """Refuse updates without factors, and updates whose combination the format cannot store."""
    for update, label in zip(row, labels, strict=True):
        if update is None:
            continue
        with place(label), place(name):
            if not isinstance(update, LowRank):
                _ = update.factors  # raises an error that says how to get factors
            if update.layout.kind == "conv" and update.layout.groups > 1:
                raise MismatchError(
                    "the B of a grouped convolution is block-diagonal, and that of a combination would not be",
                    fix=f"for all adapters but one, {LEAVE_OUT}",
                )
    check_same_rows(name, row)


def check_same_rows(name: str, row: Row) -> None:
    """Refuse updates whose rows are in two orders, because rows of the same index then belong to different outputs."""
    orders = {update.layout.rows for update in row if update is not None}
    if len(orders) > 1:
        raise MismatchError(
            f"{name}: its rows are in the order of {max(orders)} in one adapter and in that of the base in another",
            fix="read the adapters with the base that states the numbers of heads: --base (in Python: load(…, base=…));"
            " for a command without it, convert the GGUF adapter first",
        )


def single_module(row: Row, strengths: Sequence[float], dtype: DTypeLike | None = None) -> LowRank | None:
    """The only module with a weight in a sum, with its own factors and another scale; None if there is not exactly one.

    It is also None if its factors do not have ``dtype``, or if it is not a pair.
    """
    # A weight of 0 contributes nothing, so an adapter with it does not count.
    alone = [(update, w) for update, w in zip(row, strengths, strict=True) if update is not None and w]
    if len(alone) != 1:
        return None
    module, w = alone[0]
    if not isinstance(module, LowRank) or not module.scale:
        return None
    if dtype is not None and any(factor.dtype != dtype for factor in module.factors):
        return None
    return module if w == 1 else module.rescaled(w * module.scale, COMBINED)


def keep_modules(rows: Mapping[str, Row], candidates: Mapping[str, LowRank | None]) -> dict[str, LowRank]:
    """The ``candidates`` that may keep their factors. Modules that share a rank and a scale keep them only together."""
    groups = shared_ranks({name: next(update for update in row if update is not None) for name, row in rows.items()})
    broken = {group for name, group in groups.items() if candidates.get(name) is None}
    # Files store one rank and one α for such a group.
    broken |= _groups_that_differ(groups, candidates)
    return {name: module for name, module in candidates.items() if module and groups.get(name) not in broken}


def _groups_that_differ(groups: Mapping[str, str], candidates: Mapping[str, LowRank | None]) -> set[str]:
    """The groups whose members differ in rank or scale."""
    terms: dict[str, set[tuple[int, float]]] = {}
    for name, group in groups.items():
        module = candidates.get(name)
        if module is not None:
            terms.setdefault(group, set()).add((module.rank, module.scale))
    return {group for group, each in terms.items() if len(each) > 1}


def one_rank_a_stack(modules: Mapping[str, Update]) -> dict[str, Update]:
    """The modules, where those that must have the same rank are padded with zeros to the largest rank among them."""
    groups = shared_ranks(modules)
    widest: dict[str, int] = {}
    for name, group in groups.items():
        widest[group] = max(widest.get(group, 0), modules[name].rank)
    return {name: pad_rank(module, widest.get(groups.get(name, ""), 0)) for name, module in modules.items()}


def pad_rank(module: Update, rank: int) -> Update:
    """The same update with factors padded with zeros to ``rank``; an update that is not a pair is returned as it is."""
    if module.rank >= rank or not isinstance(module, LowRank):
        return module
    # Zeros on both sides: the product is the same, and so is the scale.
    (out, in_), padding, (B, A) = module.shape, rank - module.rank, module.factors
    wide = B.map(lambda X: np.pad(X, ((0, 0), (0, padding))), shape=(out, rank))
    tall = A.map(lambda X: np.pad(X, ((0, padding), (0, 0))), shape=(rank, in_))
    return LowRank(wide, tall, module.scale, scaling=module.scaling, layout=module.layout)
