"""The changes of stored tensors that follow from the tensors of an adapter other than its pairs."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import ml_dtypes  # noqa: F401 - teaches NumPy the name bfloat16
import numpy as np

from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import LazyArray
from loralens.core.stored import record_of
from loralens.core.structured import Dense, Structured
from loralens.core.together import MAGNITUDES, NORMS
from loralens.core.weights import Weights, merged_dtype
from loralens.errors import LEAVE_OUT, FormatError, MismatchError
from loralens.merging.merge_plan import MergePlan, TensorPlan, Tokens, Weighted, as_matrix

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


def find_changes(
    adapter: Adapter, strength: float, weights: Weights, base: Mapping[str, LazyArray]
) -> tuple[dict[str, Changes], list[str], list[str]]:
    """Find the changes that follow from the extra tensors of an adapter.

    Returns the changes by key of the base, the tensors that have no place in it, and notes for the user.

    Replacements (saved modules, PEFT's biases, token rows) and DoRA's magnitudes do not depend on ``strength``. Full
    differences are multiplied by it.

    Raises
    ------
    FormatError
        A tensor has a role that a merge cannot apply.
    MismatchError
        The shape of a difference or replacement does not fit the tensor of the base.
    """
    found: dict[str, Changes] = {}
    missing, notes = list[str](), list[str]()
    for key, extra in adapter.extra.items():
        # A copy is a tensor that PEFT stored twice; its original is handled on its own.
        if extra.role == "copy":
            continue
        target = _target_key(key, extra, weights)
        # A saved module may be new to the model (a head); anything else needs a tensor that it changes.
        if target not in base and extra.role not in ("saved", "embedding"):
            missing.append(key)
            continue
        before = found.get(target, Changes())
        found[target] = _extend_changes(before, key, extra, adapter, strength, target, base.get(target))
    count = sum(extra.role in NORMS for extra in adapter.extra.values())
    if count:
        notes.append(f"{count} DoRA modules have no magnitude in the file: the lengths in W are used")
    replaced = [key for key, change in found.items() if change.replacement is not None]
    # A weight of an adapter cannot scale a replacement: there is no difference to scale.
    if replaced and strength != 1:
        what = "1 tensor" if len(replaced) == 1 else f"{len(replaced)} tensors"
        notes.append(f"{what} trained in full: used in place of the base's; the adapter's weight does not apply")
    return found, missing, notes


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


ENDS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}  # PEFT's task → end of the class

_HEAD = re.compile(r"(^|\.)(classifier|score|classifier\.out_proj)\.weight$")
_STEM = re.compile(r"(.+?)(LMHeadModel|Model|For[A-Z]\w+)$")  # the name of a class without its head


def head_fields(
    changed: Mapping[str, TensorPlan], adapters: Sequence[Adapter], config: Mapping[str, Any]
) -> tuple[list[str], dict[str, object]]:
    """Notes for the user, and the fields of the configuration that change.

    There is a label for each output of the head. If the base has the same number of labels, their names stay. The class
    of the model follows from the task of the adapter and the class of the base. If there is no such task, it is the
    class that the adapter's configuration names.
    """
    head_keys = [key for key, tensor in changed.items() if tensor.replacement is not None and _HEAD.search(key)]
    # Two new heads leave open which of them the labels belong to.
    if len(head_keys) != 1 or not config:
        return [], {}
    key = head_keys[0]
    count = changed[key].shape[0]
    # The labels in the training records of loralens. If two adapters have labels, nothing says whose names count.
    label_lists = [labels for adapter in adapters if (labels := (record_of(adapter) or {}).get("labels"))]
    fits = len(label_lists) == 1 and isinstance(label_lists[0], list) and len(label_lists[0]) == count
    names = [str(label) for label in label_lists[0]] if fits else []
    fields = {**_label_fields(count, names, config), **_architecture_field(adapters, config)}
    notes = []
    if "id2label" in fields:
        names_note = "as the adapter names them" if names else "LABEL_0 and so on: the adapter does not name them"
        notes.append(f"config.json gets {count} labels for {key}, {names_note}")
    if "architectures" in fields:
        notes.append(f"config.json says {fields['architectures'][0]} now")  # type: ignore[index]
    # The base has no such tensor, so the class of the base would ignore the new head.
    elif changed[key].base is None:
        notes.append(f"nothing says which class {key} belongs to: load the model with the class that has this head")
    return notes, fields


def _label_fields(count: int, names: list[str], config: Mapping[str, Any]) -> dict[str, object]:
    """Fields for ``count`` labels; none if the configuration has this number of labels and, if given, these names."""
    named = config.get("id2label")
    base_count = len(named) if isinstance(named, dict) else config.get("num_labels", 2)  # transformers' default is 2
    same = not names or (isinstance(named, dict) and [named.get(str(i)) for i in range(count)] == names)
    # Unchanged: the file keeps its names.
    if base_count == count and same:
        return {}
    # transformers' default names.
    names = names or [f"LABEL_{i}" for i in range(count)]
    fields: dict[str, object] = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    return fields | ({"num_labels": count} if "num_labels" in config else {})


def _architecture_field(adapters: Sequence[Adapter], config: Mapping[str, Any]) -> dict[str, object]:
    """The field that names the class of the model, if that is known and differs from the class of the base."""
    base_classes = config.get("architectures")
    # Several classes leave open which of them has the head.
    if not (isinstance(base_classes, list) and len(base_classes) == 1 and isinstance(base_classes[0], str)):
        return {}
    classes = {name for adapter in adapters if (name := _class_name(adapter.config or {}, base_classes[0]))}
    return {"architectures": sorted(classes)} if len(classes) == 1 and classes != set(base_classes) else {}


def _class_name(config: Mapping[str, Any], base: str) -> str | None:
    """The class with which an adapter was trained, according to its configuration."""
    end, stem = ENDS.get(str(config.get("task_type"))), _STEM.match(base)
    if end and stem:
        return stem[1] + end
    # PEFT writes this field for adapters without a task.
    mapping = config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return name if isinstance(name, str) and "Classification" in name else None


# Older versions of transformers write the first name, newer ones the second.
FIELDS = ("torch_dtype", "dtype")  # of config.json
QUANTISATION = ("quantization_config", "quantization")  # of config.json; the second one is MLX's


def recast(
    plan: MergePlan,
    tensors: Mapping[str, LazyArray],
    dtype: str | None,
    *,
    scales: Mapping[str, LazyArray],
    coded: Collection[str],
    without: Collection[str],
    config: Mapping[str, Any],
) -> MergePlan:
    """Add to a plan all other tensors that change their dtype, and the fields of the configuration that name the dtype.

    Parameters
    ----------
    plan : MergePlan
    tensors : mapping of str to LazyArray
        All tensors of the base, as stored; quantised weights are decoded.
    dtype : str or None
        NumPy's name of the dtype. None keeps the dtype of every tensor.
    scales : mapping of str to LazyArray
        The scales of float8 weights. In another dtype these weights are stored as products, without scales.
    coded : collection of str
        Keys of the weights that are stored as codes. In another dtype they are stored as floats.
    without : collection of str
        Keys of the stored scales and codes, which the merged model does not have.
    config : mapping
        ``config.json``.
    """
    # Every tensor keeps its dtype, so only the adapted tensors change.
    if dtype is None:
        count = sum(tensor.scale is not None for tensor in plan.tensors.values())
        note = f"{count} weights are float8 with scales: they are decoded, merged, and rounded to float8 again"
        return replace(plan, notes=(*plan.notes, note)) if count else plan
    untouched = {
        key: TensorPlan(key, tensor, as_matrix(tensor.shape), scale=scales.get(key))
        for key, tensor in tensors.items()
        if key not in plan.tensors
    }
    # Integers and tensors that already have the dtype are copied as they are. Codes must be decoded first.
    changing = {
        key: tensor
        for key, tensor in untouched.items()
        if key in coded or recast_dtype(tensor, dtype) != tensor.source.dtype
    }
    # A decoded weight is a new tensor of the merged model.
    planned = {
        key: replace(tensor, base=None, replacement=tensor.source) if key in coded else tensor
        for key, tensor in {**plan.tensors, **changing}.items()
    }
    fields: dict[str, object] = {name: dtype for name in FIELDS if name in config}
    if scales or coded:
        # transformers and mlx-lm would otherwise look for the scales that are no longer stored.
        fields |= dict.fromkeys((name for name in QUANTISATION if name in config), None)
    notes = [f"{len(scales)} float8 weights become {dtype}, multiplied by their scales"] if scales else []
    notes += [f"{len(coded)} low-bit weights become {dtype}"] if coded else []
    return replace(
        plan,
        tensors=planned,
        config={**plan.config, **fields},
        dropped=tuple(without),
        notes=(*plan.notes, *notes),
    )


def recast_dtype(tensor: TensorPlan, dtype: str | None) -> np.dtype[Any]:
    """The dtype of a tensor in the merged model."""
    return merged_dtype(tensor.dtype, dtype, scaled=tensor.scale is not None)
