"""Adapters as vectors: the exact sum of weighted updates, and what makes an adapter of combined modules."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite

from loralens.core.adapter import Adapter
from loralens.core.carried import BOUND, Carried, carried
from loralens.core.joint import Joint
from loralens.core.structured import Update
from loralens.core.together import checked, keepable, kept, one_rank_a_stack, together
from loralens.errors import OptionError, place


def assembled(first: Adapter, modules: Mapping[str, Update], extras: Carried) -> Adapter:
    """The adapter of these modules, with the dialect, the metadata and the base of ``first``.

    Modules that can only have one rank together, such as the experts of a stack, get that of the widest.
    """
    extra = {key: one for key, one in extras.extra.items() if one.role not in BOUND or one.module in modules}
    return replace(with_modules(first, modules), extra=extra, config=extras.config)


def with_modules(adapter: Adapter, modules: Mapping[str, Update]) -> Adapter:
    """``adapter`` with these modules in place of its own, those of one stack of one rank."""
    gone = any(name not in modules for name in adapter)
    return replace(adapter, modules=one_rank_a_stack(modules), narrowed=adapter.narrowed or gone)


def weighted_sum(terms: Sequence[tuple[Adapter, float]]) -> Adapter:
    """Σ w_t·ΔW_t of several adapters, exact, every module re-factored to its numerical rank.

    A module that one adapter alone has keeps its factors, to the bit, under another scale. What ``+``, ``-`` and ``*``
    of an `Adapter` do; `loralens.arithmetic.combine.combine` has methods, strengths by module, and says what came of
    each adapter.

    Raises
    ------
    OptionError
        A weight that is not finite.
    MismatchError
        No module in common; what does not add up (DoRA, full tensors in several, updates that are no pair).
    ShapeError
        A module of two shapes.
    """
    adapters, strengths = [adapter for adapter, _ in terms], [float(w) for _, w in terms]
    for w in strengths:
        if not isfinite(w):
            raise OptionError(f"a weight is {w}", fix="give finite numbers")
    # Adapters from operators have no names of their own for messages.
    labels = [f"adapter {t}" for t in range(1, len(terms) + 1)]
    rows = together(adapters, labels)
    modules: dict[str, Update] = {**keepable(rows, {name: kept(row, strengths) for name, row in rows.items()})}
    extras = carried(adapters, lambda t, _: strengths[t], labels=labels, factors_stay=len(modules) == len(rows))
    for name, row in rows.items():
        if name not in modules:
            checked(name, row, labels)
            with place(name):
                joint = Joint.of(row, strengths)
                # Loaded, because the joint space is made anew at every read otherwise.
                modules[name] = joint.lift(joint.total()).load()
    return assembled(adapters[0], modules, extras)
