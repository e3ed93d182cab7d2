"""Matching the modules of several adapters, under the names of the first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, final

import numpy as np
from numpy.typing import DTypeLike

from loralens.core.adapter import Adapter, Extra
from loralens.core.joint import COMBINED, Joint
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.matching import same_modules
from loralens.core.names import kind, some
from loralens.core.ranks import shared_ranks
from loralens.core.structured import Update
from loralens.errors import LEAVE_OUT, MismatchError, OptionError, ShapeError, place
from loralens.linalg.factor import check_in_range

StrengthOf = Callable[[int, str], float]  # (index of an adapter, name of a module in it) → weight

# A number, because it is passed in place of an index. None means that the caller did not choose.
NONE = -1  # in place of the index of an adapter: the full tensors of no adapter are used
FULL = ("saved", "copy", "embedding", "tokens", "bias", "other")  # roles of tensors that cannot be added
ADDED = ("diff", "diff_b")  # roles of tensors that can be added
NORMS = ("norms", "norms_in")  # magnitudes that are not in the file and are the lengths of W
MAGNITUDES = ("magnitude", "magnitude_in", *NORMS)
BOUND = (*MAGNITUDES, "lora_bias", "diagonal")  # roles of tensors that are meaningless without their module
FIELDS = ("modules_to_save", "bias", "trainable_token_indices", "task_type")  # fields of PEFT about full tensors
# The values of these fields in an adapter without full tensors. `task_type` stays that of the first adapter.
NOBODY: Mapping[str, Any] = {"modules_to_save": None, "bias": "none", "trainable_token_indices": None}
# Task of PEFT → the modules that it trains in full and stores for this task without being told, if the model has them.
TASK_HEADS: Mapping[str, Sequence[str]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
LISTED = 6  # most modules that a message names


@final
@dataclass(frozen=True, slots=True)
class CombinedExtras:
    """The parts of a combined adapter other than its modules: extra tensors, configuration, and notes."""

    extra: Mapping[str, Extra]
    config: Mapping[str, Any] | None
    notes: tuple[str, ...] = ()


def magnitudes(adapter: Adapter) -> dict[str, str]:
    """The DoRA modules of an adapter → the keys of their magnitudes m; their weight is m · (W + ΔW)/‖W + ΔW‖."""
    return {e.module: key for key, e in adapter.extra.items() if e.role in MAGNITUDES and e.module in adapter}


def combine_extras(
    adapters: Sequence[Adapter],
    strength: StrengthOf,
    *,
    labels: Sequence[str],
    take: int | None = None,
    factors_stay: bool = False,
) -> CombinedExtras:
    """Combine the extra tensors and the configurations of ``adapters``.

    Parameters
    ----------
    strength : callable
        The weight of an adapter in a module.
    take : int, optional
        Index of the adapter whose tensors trained in full are used, or `NONE`. The default is the only one that has
        such tensors.
    factors_stay : bool
        The factors of the only adapter do not change, so tensors that depend on them may stay.

    Raises
    ------
    MismatchError
        An adapter is DoRA; a bias on B or KaSA's diagonal does not fit new factors; several adapters have full tensors
        and ``take`` is not given; or extras are in another dialect than the first adapter.
    """
    # Only then do the tensors that depend on the factors still fit them.
    alone = factors_stay and len(adapters) == 1
    for t, adapter in enumerate(adapters):
        _check_plain(
            adapter, labels[t], alone=alone, unchanged=alone and all(strength(0, name) == 1 for name in adapter)
        )
    holder, notes = _find_holder(adapters, labels, take)
    full = {} if holder is None or holder == NONE else _of_role(adapters[holder], FULL)
    extra = full | _sum_differences(adapters, strength, labels)
    if alone:
        extra |= {key: tensor for key, tensor in adapters[0].extra.items() if tensor.role not in (*FULL, *ADDED)}
        # In the order of the file, so that an unchanged adapter is written as it was.
        extra = {key: extra[key] for key in adapters[0].extra if key in extra}
    if holder is not None and full:
        _check_dialect(adapters, holder, labels)
        if any(strength(holder, name) != 1 for name in adapters[holder]):
            stay = f"{len(full)} tensors trained in full stay as they are"
            notes.append(f"{stay} in {labels[holder]}, whatever its weight")
    return CombinedExtras(extra, _config(adapters, holder), tuple(notes))


def _of_role(adapter: Adapter, roles: Sequence[str]) -> dict[str, Extra]:
    """The extras of some roles."""
    return {key: extra for key, extra in adapter.extra.items() if extra.role in roles}


def _check_plain(adapter: Adapter, label: str, *, alone: bool, unchanged: bool) -> None:
    """Refuse an adapter whose update is not scale·B·A alone."""
    # A single DoRA adapter of weight 1 is copied: its magnitudes still belong to its factors.
    if not unchanged and _of_role(adapter, MAGNITUDES):
        raise MismatchError(
            f"{label} is a DoRA adapter: its update depends on the base weight and is of full rank",
            fix="give the base that it was trained on (--base, or weights=): sums are exact then; or loralens merge",
        )
    for role, what in (("lora_bias", "a bias on B"), ("diagonal", "KaSA's diagonal"), ("shape", "padded shapes")):
        bent = _of_role(adapter, (role,))
        if bent and not alone:
            raise MismatchError(
                f"{label} has {what}, which would not fit new factors: {next(iter(bent))} among {len(bent)} tensors",
                fix="convert it to a plain LoRA first: loralens convert --drop-extra leaves them out",
            )


def _find_holder(adapters: Sequence[Adapter], labels: Sequence[str], take: int | None) -> tuple[int | None, list[str]]:
    """The index of the adapter whose full tensors are used (None if no adapter has any), and notes about the others."""
    holders = [t for t, adapter in enumerate(adapters) if _of_role(adapter, FULL)]
    if take is not None:
        unused = [labels[t] for t in holders if t != take]
        notes = [f"tensors trained in full are left out of {', '.join(unused)}"] if unused else []
        # The chosen adapter has no full tensors, so those of the others are left out.
        if take != NONE and take not in holders:
            take = NONE if holders else None
        return take, notes
    # Equal full tensors need no choice.
    if len(holders) > 1 and not _same_full_tensors(adapters, holders):
        names = dict.fromkeys(extra.module for t in holders for extra in _of_role(adapters[t], FULL).values())
        who = ", ".join(labels[t] for t in holders)
        raise MismatchError(
            f"{who} each have modules trained in full, which cannot be added: {some(names, LISTED)}",
            fix=f"choose whose to take: --take {labels[holders[0]]}, or --take none",
        )
    return (holders[0] if holders else None), []


def _same_full_tensors(adapters: Sequence[Adapter], holders: Sequence[int]) -> bool:
    """Whether all of these adapters have the same full tensors, bit for bit, so that NaN equals itself."""
    contents = [
        {key: (one.tensor.shape, one.tensor.dtype, hash(one.tensor.read().tobytes())) for key, one in extras.items()}
        for extras in (_of_role(adapters[t], FULL) for t in holders)
    ]
    return all(content == contents[0] for content in contents)


def _check_dialect(adapters: Sequence[Adapter], holder: int, labels: Sequence[str]) -> None:
    """Refuse extras whose keys are of another dialect than the one that is written."""
    if adapters[holder].format != adapters[0].format:
        raise MismatchError(
            f"the extra tensors of {labels[holder]} are {adapters[holder].format}'s, and {labels[0]} is "
            f"{adapters[0].format}",
            fix=f"leave them out with --take none, or name {labels[holder]} first",
        )


def _sum_differences(adapters: Sequence[Adapter], strength: StrengthOf, labels: Sequence[str]) -> dict[str, Extra]:
    """The weighted sums of full differences, by key."""
    terms: dict[str, list[tuple[float, Extra]]] = {}
    for t, adapter in enumerate(adapters):
        for key, extra in _of_role(adapter, ADDED).items():
            _check_dialect(adapters, t, labels)
            terms.setdefault(key, []).append((strength(t, extra.module), extra))
    return {key: replace(each[0][1], tensor=_weighted_difference(each)) for key, each in terms.items()}


def _weighted_difference(terms: Sequence[tuple[float, Extra]]) -> LazyArray:
    """The weighted sum of differences of one tensor, computed in float64 and rounded to the dtype of the first.

    Reading it raises FormatError if its numbers are too large for the dtype.

    Raises
    ------
    MismatchError
        The differences have several shapes.
    """
    first = terms[0][1].tensor
    # The only difference, at full strength, stays as it is stored, bit for bit.
    if len(terms) == 1 and terms[0][0] == 1:
        return first
    if any(extra.tensor.shape != first.shape for _, extra in terms):
        raise MismatchError("differences of one tensor have several shapes", fix="give adapters of one base model")

    def total() -> Array:
        summed = sum((w * extra.tensor.read().astype(np.float64) for w, extra in terms), np.zeros(first.shape))
        with np.errstate(over="ignore"):
            # A sum that was infinite before rounding came from infinite differences and is passed on.
            rounded = np.asarray(summed).astype(first.dtype)
        return check_in_range(rounded, first.dtype, what="differences") if np.isfinite(summed).all() else rounded

    return LazyArray(total, shape=first.shape, dtype=first.dtype)


def _config(adapters: Sequence[Adapter], holder: int | None) -> Mapping[str, Any] | None:
    """The configuration of the first adapter, with the fields about full tensors from the adapter that has them."""
    config = adapters[0].config
    # Only PEFT's configuration has such fields.
    if config is None or adapters[0].format != "peft" or holder is None or holder == 0:
        return config
    if holder == NONE:
        return {**config, **{key: value for key, value in NOBODY.items() if key in config}}
    holder_config = adapters[holder].config or {}
    return {**config, **{key: holder_config[key] for key in FIELDS if key in holder_config}}


# None rather than a missing entry, so that a row has the order of the adapters.
Row = tuple[Update | None, ...]  # one module of every adapter; None where an adapter does not have it
KINDS_LISTED = 4  # most kinds of an adapter that a message names


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


def match_names(adapters: Sequence[Adapter], labels: Sequence[str] = ()) -> dict[str, tuple[str | None, ...]]:
    """Module name → its names in all adapters, None where an adapter does not have it (see `match_modules`).

    Without ``labels`` for a message, adapters may have no module in common.
    """
    names: dict[str, list[str | None]] = {name: [name] for name in adapters[0]}
    for t, adapter in enumerate(adapters[1:], 1):
        same_names = same_modules(names, adapter)
        # No common module at all is nearly always a mistake in the choice of adapters.
        if labels and not same_names:
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
    kinds = some(dict.fromkeys(map(kind, adapter)), KINDS_LISTED)
    return f"{len(adapter)} modules ({kinds}), {next(iter(adapter), 'none')} first"


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
    # Files store one rank and one α for such a group.
    forms: dict[str, set[tuple[int, float] | None]] = {}
    for name, group in groups.items():
        module = candidates.get(name)
        forms.setdefault(group, set()).add((module.rank, module.scale) if module else None)
    broken = {group for group, each in forms.items() if len(each) > 1 or None in each}
    return {name: module for name, module in candidates.items() if module and groups.get(name) not in broken}


def one_rank_a_stack(modules: Mapping[str, Update]) -> dict[str, Update]:
    """The modules, where those that must have the same rank are padded with zeros to the largest rank among them."""
    groups = shared_ranks(modules)
    widest: dict[str, int] = {}
    for name, group in groups.items():
        widest[group] = max(widest.get(group, 0), modules[name].rank)
    return {name: pad_rank(module, widest.get(groups.get(name, ""), 0)) for name, module in modules.items()}


def pad_rank(module: Update, rank: int, dtype: DTypeLike | None = None) -> Update:
    """The same update with factors padded with zeros to ``rank``, and in ``dtype``, by default their own.

    An update that is not a pair, or needs no change, is returned as it is.
    """
    if not isinstance(module, LowRank) or (module.rank >= rank and dtype in (None, module.dtype)):
        return module
    # Zeros on both sides: the product is the same, and so is the scale.
    (out, in_), padding, (B, A) = module.shape, rank - module.rank, module.factors
    wide_type, tall_type = (np.dtype(dtype or factor.dtype) for factor in (B, A))
    wide = B.map(lambda X: np.pad(X.astype(wide_type), ((0, 0), (0, padding))), shape=(out, rank), dtype=wide_type)
    tall = A.map(lambda X: np.pad(X.astype(tall_type), ((0, padding), (0, 0))), shape=(rank, in_), dtype=tall_type)
    return LowRank(wide, tall, module.scale, scaling=module.scaling, layout=module.layout)


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
    origins = " and ".join(adapter.source.removeprefix("in memory: ") for adapter in adapters if adapter.source)
    return replace(assemble_adapter(adapters[0], modules, extras), source=f"in memory: sum of {origins}")
