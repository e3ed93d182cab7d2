"""The changes of stored tensors that follow from the tensors of an adapter other than its pairs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import LazyArray
from loralens.core.structured import Dense, Structured
from loralens.core.together import MAGNITUDES, NORMS
from loralens.core.weights import Weights
from loralens.errors import LEAVE_OUT, FormatError, MismatchError
from loralens.merging.plan import Tokens, as_matrix
from loralens.merging.update import Weighted

UNREADABLE = {  # role of an extra tensor that a merge cannot apply → what it is
    "shape": "weights padded to another shape",
    "diagonal": "KaSA's diagonal, whose base was truncated",
    "other": "tensors that were not understood",
}


@final
@dataclass(frozen=True, slots=True)
class Changes:
    """The changes of one stored tensor other than the update of a pair.

    Attributes
    ----------
    magnitude : tuple of (LazyArray or None, bool) or None
        DoRA's lengths (None stands for those of the base), and whether there is one length for each output.
    added : tuple of (float, Structured)
        Full differences, each with the strength of its adapter.
    """

    replacement: LazyArray | None = None
    tokens: Tokens | None = None
    magnitude: tuple[LazyArray | None, bool] | None = None
    added: tuple[Weighted, ...] = ()


@final
@dataclass(slots=True)
class ExtraChanges:
    """The changes by key of the base, the tensors that have no place in it, and notes for the user."""

    changes: dict[str, Changes] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_changes(adapter: Adapter, strength: float, weights: Weights, base: Mapping[str, LazyArray]) -> ExtraChanges:
    """Find the changes that follow from the extra tensors of an adapter.

    Replacements (saved modules, PEFT's biases, token rows) and DoRA's magnitudes do not depend on ``strength``. Full
    differences are multiplied by it.

    Raises
    ------
    FormatError
        A tensor has a role that a merge cannot apply.
    MismatchError
        The shape of a difference or replacement does not fit the tensor of the base.
    """
    result = ExtraChanges()
    for key, extra in adapter.extra.items():
        # A copy is a tensor that PEFT stored twice; its original is handled on its own.
        if extra.role == "copy":
            continue
        target = _target_key(key, extra, weights)
        # A saved module may be new to the model (a head); anything else needs a tensor that it changes.
        if target not in base and extra.role not in ("saved", "embedding"):
            result.missing.append(key)
            continue
        before = result.changes.get(target, Changes())
        result.changes[target] = _extend_changes(before, key, extra, adapter, strength, target, base.get(target))
    count = sum(extra.role in NORMS for extra in adapter.extra.values())
    if count:
        result.notes.append(f"{count} DoRA modules have no magnitude in the file: the lengths in W are used")
    replaced = [key for key, change in result.changes.items() if change.replacement is not None]
    # A weight of an adapter cannot scale a replacement: there is no difference to scale.
    if replaced and strength != 1:
        what = "1 tensor" if len(replaced) == 1 else f"{len(replaced)} tensors"
        result.notes.append(f"{what} trained in full: used in place of the base's; the adapter's weight does not apply")
    return result


def _target_key(key: str, extra: Extra, weights: Weights) -> str:
    """The key in the base of the tensor that an extra tensor changes. Raises the errors of `find_changes`."""
    if extra.role in UNREADABLE:
        raise FormatError(
            f"{key}: {UNREADABLE[extra.role]} cannot be merged",
            fix="name the modules to merge with --modules; tensors of other modules are left out",
        )
    weight = weights.modules.get(extra.module)
    # The tensors of a module belong to its whole weight; nothing says how they would be divided.
    if weight and weight.scattered:
        raise MismatchError(
            f"{key}: the base stores the weight of {extra.module} in parts, but a {extra.role} needs the whole weight",
            fix=f"{LEAVE_OUT}; or merge it where it was trained",
        )
    home = weight.key if weight else f"{weights.match.rename(extra.module)}.weight"
    # Magnitudes and tokens change the weight of their module, all others the parameter that they name.
    of_weight = extra.role in (*MAGNITUDES, "tokens")
    return home if of_weight else f"{home.removesuffix('.weight')}.{extra.parameter}"


def _extend_changes(
    changes: Changes, key: str, extra: Extra, adapter: Adapter, strength: float, target: str, base: LazyArray | None
) -> Changes:
    """The changes of the tensor ``base`` under the key ``target``, with that of one more extra tensor added."""
    tensor, role = extra.tensor, extra.role
    if role in ("saved", "bias", "embedding"):
        # An embedding may be replaced by a resized one.
        if base is not None and base.shape != tensor.shape and role != "embedding":
            raise MismatchError(
                f"{key} {tensor.shape} cannot replace {target} {base.shape}",
                fix="give the base that the adapter was trained on",
            )
        return replace(changes, replacement=tensor)
    if role == "tokens":
        return replace(changes, tokens=_trained_tokens(key, extra, adapter.config))
    if role in MAGNITUDES:
        return replace(changes, magnitude=(None if role in NORMS else tensor, role in ("magnitude", "norms")))
    assert role in ("lora_bias", "diff", "diff_b"), role
    assert base is not None
    # Shapes are compared as matrices, because a convolution of kernel 1 is also stored with two axes.
    if as_matrix(tensor.shape) != as_matrix(base.shape):
        raise MismatchError(
            f"{key} {tensor.shape} cannot be added to {target} {base.shape}",
            fix="give the base that the adapter was trained on",
        )
    # PEFT adds the bias of lora_B before it scales.
    scale = adapter[extra.module].scale if role == "lora_bias" else 1.0
    term = (strength, Structured(Dense(tensor.reshape(*as_matrix(tensor.shape))), scale))
    return replace(changes, added=(*changes.added, term))


def _trained_tokens(key: str, extra: Extra, config: Mapping[str, Any] | None) -> Tokens:
    """The rows of an embedding that were trained; the configuration has their indices."""
    indices = (config or {}).get("trainable_token_indices")
    # PEFT stores one list for the embedding, or a list for every module by its name or the end of it.
    if isinstance(indices, dict):
        indices = next((rows for name, rows in indices.items() if f".{extra.module}".endswith(f".{name}")), None)
    if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
        raise FormatError(
            f"{key}: the indices of these rows are unknown", fix="put adapter_config.json into the folder of the file"
        )
    if len(indices) != extra.tensor.shape[0]:
        raise FormatError(
            f"{key} has {extra.tensor.shape[0]} rows, but the configuration names {len(indices)} tokens",
            fix="save the adapter again",
        )
    return Tokens(tuple(indices), extra.tensor)
