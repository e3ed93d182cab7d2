"""Combining the tensors of adapters that do not belong to pairs.

Full differences can be added like updates. Tensors trained in full (heads, biases, embeddings) cannot: the result has
those of one adapter, and if several adapters have them, the user must choose one. Tensors that change the update itself
(DoRA's magnitudes, a bias on B) are refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np

from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import Array, LazyArray
from loralens.errors import MismatchError
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
        names = list(dict.fromkeys(extra.module for t in holders for extra in _of_role(adapters[t], FULL).values()))
        shown = ", ".join(names[:LISTED]) + (" …" if len(names) > LISTED else "")
        who = ", ".join(labels[t] for t in holders)
        raise MismatchError(
            f"{who} each have modules trained in full, which cannot be added: {shown}",
            fix=f"choose whose to take: --take {labels[holders[0]]}, or --take none",
        )
    return (holders[0] if holders else None), []


def _same_full_tensors(adapters: Sequence[Adapter], holders: Sequence[int]) -> bool:
    """Whether all of these adapters have the same full tensors, bit for bit."""
    first, *other_tensors = (_of_role(adapters[t], FULL) for t in holders)

    def equal(key: str, other: Mapping[str, Extra]) -> bool:
        # Bytes are compared, so that NaN equals itself. Shapes come first, because they need no reading.
        a, b = first[key].tensor, other[key].tensor
        return (a.shape, a.dtype) == (b.shape, b.dtype) and a.read().tobytes() == b.read().tobytes()

    return all(set(other) == set(first) and all(equal(key, other) for key in first) for other in other_tensors)


def _check_dialect(adapters: Sequence[Adapter], holder: int, labels: Sequence[str]) -> None:
    """Refuse extras whose keys are of another dialect than the one that is written."""
    if adapters[holder].format != adapters[0].format:
        raise MismatchError(
            f"the extra tensors of {labels[holder]} are {adapters[holder].format}'s, and {labels[0]} is "
            f"{adapters[0].format}",
            fix=f"convert it first: loralens convert --to {adapters[0].format}, or --take none",
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
