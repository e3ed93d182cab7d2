"""Fields of ``config.json`` that a merged model needs if an adapter brings a classification head."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from loralens.core.adapter import Adapter
from loralens.core.stored import record_of
from loralens.merging.plan import TensorPlan

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
