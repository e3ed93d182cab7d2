"""What adapters carry besides pairs, when several become one.

Differences add up as updates do. Tensors trained in full (heads, biases, embeddings) do not: one adapter's stand, and
where several have them somebody has to say whose. What bends the update itself (DoRA's magnitudes, a bias on B) is
refused, by name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np

from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import Array, LazyArray
from loralens.errors import MismatchError
from loralens.linalg.factor import in_range

StrengthOf = Callable[[int, str], float]  # of an adapter, by its place, in a module by the name that it has there

NONE = -1  # in the place of an adapter: nobody's full tensors
FULL = ("saved", "copy", "embedding", "tokens", "bias", "other")  # extras that do not add up
ADDED = ("diff", "diff_b")  # those that do
NORMS = ("norms", "norms_in")  # magnitudes that no file holds: the lengths of W stand for them
MAGNITUDES = ("magnitude", "magnitude_in", *NORMS)
BOUND = (*MAGNITUDES, "lora_bias", "diagonal")  # mean nothing without their module
FIELDS = ("modules_to_save", "bias", "trainable_token_indices", "task_type")  # of a PEFT configuration, that say them
NOBODY: Mapping[str, Any] = {"modules_to_save": None, "bias": "none", "trainable_token_indices": None}
LISTED = 6  # modules that a message names


@final
@dataclass(frozen=True, slots=True)
class Carried:
    """The rest of a combined adapter: its extras, its configuration, and what there is to say."""

    extra: Mapping[str, Extra]
    config: Mapping[str, Any] | None
    notes: tuple[str, ...] = ()


def magnitudes(adapter: Adapter) -> dict[str, str]:
    """DoRA module → key of its magnitude m: the tuned weight is m · (W + ΔW)/‖W + ΔW‖, not W + ΔW."""
    return {e.module: key for key, e in adapter.extra.items() if e.role in MAGNITUDES and e.module in adapter}


def carried(
    adapters: Sequence[Adapter],
    strength: StrengthOf,
    *,
    labels: Sequence[str],
    take: int | None = None,
    factors_stay: bool = False,
) -> Carried:
    """What the combination of ``adapters`` carries besides its modules.

    Parameters
    ----------
    strength : callable
        How strongly an adapter counts in a module.
    take : int, optional
        Whose tensors trained in full stand, by place; `NONE` for nobody's. By default those of the one that has any.
    factors_stay : bool
        It is one adapter whose factors are not touched, so what hangs on them may stay.

    Raises
    ------
    MismatchError
        DoRA; a bias on B or KaSA's diagonal beside new factors; full tensors in several adapters and no ``take``;
        extras in another dialect than the first adapter's.
    """
    alone = factors_stay and len(adapters) == 1
    for t, adapter in enumerate(adapters):
        _refuse_bent(adapter, labels[t], alone=alone, unchanged=alone and _unchanged(adapter, strength))
    holder, notes = _holder(adapters, labels, take)
    full = {} if holder is None or holder == NONE else _of_role(adapters[holder], FULL)
    extra = full | _added(adapters, strength, labels)
    if alone:
        rest = {key: one for key, one in adapters[0].extra.items() if one.role not in (*FULL, *ADDED)}
        extra = {key: (extra | rest)[key] for key in adapters[0].extra if key in extra or key in rest}
    if holder is not None and full:
        _check_dialect(adapters, holder, labels)
        if any(strength(holder, name) != 1 for name in adapters[holder]):
            stay = f"{len(full)} tensors trained in full stay as they are"
            notes.append(f"{stay} in {labels[holder]}, whatever its weight")
    return Carried(extra, _config(adapters, holder), tuple(notes))


def _of_role(adapter: Adapter, roles: Sequence[str]) -> dict[str, Extra]:
    """The extras of some roles."""
    return {key: one for key, one in adapter.extra.items() if one.role in roles}


def _unchanged(adapter: Adapter, strength: StrengthOf) -> bool:
    """Whether the only adapter counts once in every module."""
    return all(strength(0, name) == 1 for name in adapter)


def _refuse_bent(adapter: Adapter, label: str, *, alone: bool, unchanged: bool) -> None:
    """Refuse an adapter whose update is not scale·B·A alone."""
    if not unchanged and _of_role(adapter, MAGNITUDES):
        raise MismatchError(
            f"{label} is a DoRA adapter: its update depends on the base weight and is of full rank",
            fix="give the base that it was trained on (--base, or weights=): sums are exact then; or loralens merge",
        )
    for role, what in (("lora_bias", "a bias on B"), ("diagonal", "KaSA's diagonal"), ("shape", "padded shapes")):
        bent = _of_role(adapter, (role,))
        if bent and not alone:
            raise MismatchError(
                f"{label} has {what}, {next(iter(bent))} among {len(bent)}, which new factors would not fit",
                fix="convert it to a plain LoRA first: loralens convert --drop-extra leaves them out",
            )


def _holder(adapters: Sequence[Adapter], labels: Sequence[str], take: int | None) -> tuple[int | None, list[str]]:
    """Whose full tensors stand, by place, None where nobody has any; and what to say of the others'."""
    holders = [t for t, adapter in enumerate(adapters) if _of_role(adapter, FULL)]
    if take is not None:
        left = [labels[t] for t in holders if t != take]
        notes = [f"tensors trained in full are left out of {', '.join(left)}"] if left else []
        if take != NONE and take not in holders:  # it has none, so those of the others are left out
            take = NONE if holders else None
        return take, notes
    if len(holders) > 1 and not _same(adapters, holders):
        names = list(dict.fromkeys(one.module for t in holders for one in _of_role(adapters[t], FULL).values()))
        shown = ", ".join(names[:LISTED]) + (" …" if len(names) > LISTED else "")
        who = ", ".join(labels[t] for t in holders)
        raise MismatchError(
            f"{who} each hold modules trained in full, and those do not add up: {shown}",
            fix=f"say whose to take: --take {labels[holders[0]]}, or --take none",
        )
    return (holders[0] if holders else None), []


def _same(adapters: Sequence[Adapter], holders: Sequence[int]) -> bool:
    """Whether all of them hold the same full tensors, to the bit."""
    first, *others = (_of_role(adapters[t], FULL) for t in holders)

    def equal(key: str, other: Mapping[str, Extra]) -> bool:
        a, b = first[key].tensor, other[key].tensor
        return (a.shape, a.dtype) == (b.shape, b.dtype) and a.read().tobytes() == b.read().tobytes()

    return all(set(other) == set(first) and all(equal(key, other) for key in first) for other in others)


def _check_dialect(adapters: Sequence[Adapter], holder: int, labels: Sequence[str]) -> None:
    """Refuse extras whose keys are of another dialect than the one that is written."""
    if adapters[holder].format != adapters[0].format:
        raise MismatchError(
            f"the extra tensors of {labels[holder]} are {adapters[holder].format}'s, and {labels[0]} is "
            f"{adapters[0].format}",
            fix=f"convert it first: loralens convert --to {adapters[0].format}, or --take none",
        )


def _added(adapters: Sequence[Adapter], strength: StrengthOf, labels: Sequence[str]) -> dict[str, Extra]:
    """Differences, weighted and added up."""
    terms: dict[str, list[tuple[float, Extra]]] = {}
    for t, adapter in enumerate(adapters):
        for key, one in _of_role(adapter, ADDED).items():
            _check_dialect(adapters, t, labels)
            terms.setdefault(key, []).append((strength(t, one.module), one))
    return {key: replace(each[0][1], tensor=_weighted(each)) for key, each in terms.items()}


def _weighted(terms: Sequence[tuple[float, Extra]]) -> LazyArray:
    """The sum of some differences of one tensor, computed in float64 and rounded to the dtype of the first.

    Reading it raises FormatError where its numbers are too large for that.

    Raises
    ------
    MismatchError
        They have several shapes.
    """
    first = terms[0][1].tensor
    if len(terms) == 1 and terms[0][0] == 1:
        return first
    if any(one.tensor.shape != first.shape for _, one in terms):
        raise MismatchError("differences of one tensor have several shapes", fix="give adapters of one base model")

    def total() -> Array:
        summed = sum((w * one.tensor.read().astype(np.float64) for w, one in terms), np.zeros(first.shape))
        with np.errstate(over="ignore"):
            rounded = np.asarray(summed).astype(first.dtype)
        return in_range(rounded, first.dtype, what="differences") if np.isfinite(summed).all() else rounded

    return LazyArray(total, shape=first.shape, dtype=first.dtype)


def _config(adapters: Sequence[Adapter], holder: int | None) -> Mapping[str, Any] | None:
    """The first adapter's configuration, with what the holder of full tensors says of them."""
    config = adapters[0].config
    if config is None or adapters[0].format != "peft" or holder is None or holder == 0:
        return config
    if holder == NONE:
        return {**config, **{key: value for key, value in NOBODY.items() if key in config}}
    said = adapters[holder].config or {}
    return {**config, **{key: said[key] for key in FIELDS if key in said}}
