"""The exact weighted sum of adapters, and functions that build an adapter from new modules."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite

from loralens.core.adapter import Adapter
from loralens.core.carried import BOUND, CombinedExtras, combine_extras
from loralens.core.joint import Joint
from loralens.core.structured import Update
from loralens.core.together import check_combinable, keep_modules, match_modules, one_rank_a_stack, single_module
from loralens.errors import OptionError, place


def assemble_adapter(first: Adapter, modules: Mapping[str, Update], extras: CombinedExtras) -> Adapter:
    """Build an adapter from these modules, with the dialect, the metadata and the base of ``first``.

    Modules that must have the same rank, such as the experts of a stack, get the largest rank among them.
    """
    # Tensors that mean nothing without their module are left out with it.
    extra = {
        key: tensor for key, tensor in extras.extra.items() if tensor.role not in BOUND or tensor.module in modules
    }
    return replace(with_modules(first, modules), extra=extra, config=extras.config)


def with_modules(adapter: Adapter, modules: Mapping[str, Update]) -> Adapter:
    """``adapter`` with these modules instead of its own; modules of one stack get the same rank."""
    # If modules are gone, a configuration that selects modules by a pattern names too many.
    gone = any(name not in modules for name in adapter)
    return replace(adapter, modules=one_rank_a_stack(modules), narrowed=adapter.narrowed or gone)


def sum_adapters(terms: Sequence[tuple[Adapter, float]]) -> Adapter:
    """Σ w_t·ΔW_t of several adapters, exact, every module re-factored to its numerical rank.

    A module that only one adapter has keeps its factors bit for bit, with another scale. The operators ``+``, ``-`` and
    ``*`` of an `Adapter` use this function. `loralens.arithmetic.combine` has other methods and weights by module.

    Raises
    ------
    OptionError
        A weight is not finite.
    MismatchError
        The adapters have no module in common, or cannot be added (DoRA, several with full tensors, updates that are not
        pairs).
    ShapeError
        A module has two shapes.
    """
    adapters, strengths = [adapter for adapter, _ in terms], [float(w) for _, w in terms]
    for w in strengths:
        if not isfinite(w):
            raise OptionError(f"the weight {w} is not finite", fix="give finite numbers")
    # Adapters from operators have no names of their own for messages.
    labels = [f"adapter {t}" for t in range(1, len(terms) + 1)]
    rows = match_modules(adapters, labels)
    modules: dict[str, Update] = {
        **keep_modules(rows, {name: single_module(row, strengths) for name, row in rows.items()})
    }
    extras = combine_extras(adapters, lambda t, _: strengths[t], labels=labels, factors_stay=len(modules) == len(rows))
    for name, row in rows.items():
        if name not in modules:
            check_combinable(name, row, labels)
            with place(name):
                joint = Joint.of(row, strengths)
                # Loaded, because the joint space is made anew at every read otherwise.
                modules[name] = joint.lift(joint.total()).load()
    return assemble_adapter(adapters[0], modules, extras)
