"""Heads: what ``config.json`` has to say of a classification head that an adapter brings, so that it can be loaded."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from loralens.core.adapter import Adapter
from loralens.core.training import record_of
from loralens.merging.plan import TensorPlan

ENDS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}  # PEFT's task → class

_HEAD = re.compile(r"(^|\.)(classifier|score|classifier\.out_proj)\.weight$")
_STEM = re.compile(r"(.+?)(LMHeadModel|Model|For[A-Z]\w+)$")  # of the name of a class


def head_fields(
    changed: Mapping[str, TensorPlan], adapters: Sequence[Adapter], config: Mapping[str, Any]
) -> tuple[list[str], dict[str, object]]:
    """What to tell the user, and which fields of the configuration change.

    Labels are as many as the head has outputs; where the base has as many, their names stay. The class follows from the
    adapter's task and the class of the base, or is the one that the adapter says it was trained with.
    """
    found = [key for key, tensor in changed.items() if tensor.replacement is not None and _HEAD.search(key)]
    if len(found) != 1 or not config:
        return [], {}
    key = found[0]
    count = changed[key].shape[0]
    names = _names(adapters, count)
    fields = {**_labels(count, names, config), **_architectures(adapters, config)}
    notes = []
    if "id2label" in fields:
        said = "as the adapter names them" if names else "LABEL_0 and so on: the adapter does not name them"
        notes.append(f"config.json gets {count} labels for {key}, {said}")
    if "architectures" in fields:
        notes.append(f"config.json says {fields['architectures'][0]} now")  # type: ignore[index]
    elif changed[key].base is None:
        notes.append(f"nothing says which class {key} belongs to: load the model with the one that has it")
    return notes, fields


def _names(adapters: Sequence[Adapter], count: int) -> list[str]:
    """The labels that the one adapter trained by loralens was trained on; empty where none or several say so."""
    said = [labels for adapter in adapters if (labels := (record_of(adapter) or {}).get("labels"))]
    fits = len(said) == 1 and isinstance(said[0], list) and len(said[0]) == count
    return [str(label) for label in said[0]] if fits else []


def _labels(count: int, names: list[str], config: Mapping[str, Any]) -> dict[str, object]:
    """Fields for this many labels; none where the configuration has as many, by these names if there are any."""
    named = config.get("id2label")
    known = len(named) if isinstance(named, dict) else config.get("num_labels", 2)  # 2 in all of transformers
    same = not names or (isinstance(named, dict) and [named.get(str(i)) for i in range(count)] == names)
    if known == count and same:
        return {}
    names = names or [f"LABEL_{i}" for i in range(count)]
    fields: dict[str, object] = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    return fields | ({"num_labels": count} if "num_labels" in config else {})


def _architectures(adapters: Sequence[Adapter], config: Mapping[str, Any]) -> dict[str, object]:
    """The field that names the class of the whole model, where that can be known and is another than the base's."""
    made = config.get("architectures")
    if not (isinstance(made, list) and len(made) == 1 and isinstance(made[0], str)):
        return {}
    wanted = {name for adapter in adapters if (name := _class(adapter.config or {}, made[0]))}
    return {"architectures": sorted(wanted)} if len(wanted) == 1 and wanted != set(made) else {}


def _class(said: Mapping[str, Any], base: str) -> str | None:
    """What an adapter's configuration says of the class that it was trained in."""
    end, stem = ENDS.get(str(said.get("task_type"))), _STEM.match(base)
    if end and stem:
        return stem[1] + end
    mapping = said.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return name if isinstance(name, str) and "Classification" in name else None
