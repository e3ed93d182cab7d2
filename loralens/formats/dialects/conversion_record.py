"""The record that loralens adds to a file that it converts: names and scales that the dialect cannot store.

A kohya file has no dots in its names, and a loralib file has no α. Under the key ``loralens`` of the metadata, the
record holds the canonical name, the scale and the origin of the scale for every module of the file, so that loralens
reads its own files back without ``--base`` or ``--alpha``. It also holds what PEFT's configuration said about the
training: task, dropout, `target_modules` (`loralens.formats.dialects.conversion_record`).

If somebody has changed the file since, the file counts and not the record: modules that are missing stay missing, and
a scale that differs is taken from the file.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, get_args

from loralens.core.adapter import Adapter, Finding
from loralens.core.lowrank import ScaleFormula, Scaling
from loralens.core.structured import Update
from loralens.formats.dialects.pairs import Fields
from loralens.formats.dialects.peft.reader import lora_fields
from loralens.formats.files.container import RECORD, Stored, read_json
from loralens.formats.files.json_text import (
    NAME_LIMIT,
    finite_number,
    is_safe_text,
    json_or_none,
    json_text,
    plain_text,
)
from loralens.formats.files.location import is_pickle
from loralens.version import __version__


def _is_text(value: Any) -> bool:
    return plain_text(value) is not None


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= NAME_LIMIT and all(map(_is_text, value))


def _is_target(value: Any) -> bool:
    return _is_text(value) or _is_texts(value)


def _is_layers(value: Any) -> bool:
    # PEFT takes a single number as well.
    layers = value if isinstance(value, list) else [value]
    return all(type(layer) is int and 0 <= layer < 2**31 for layer in layers)


# Fields that say which modules PEFT adapts. They are valid only as long as the file has the same modules.
TARGETS: Mapping[str, Callable[[Any], bool]] = {
    "target_modules": _is_target,
    "exclude_modules": _is_target,
    "layers_to_transform": _is_layers,
    "layers_pattern": _is_target,
    "target_parameters": _is_texts,
}
# field → check of its value. The values come from a file, and go into a configuration that PEFT reads.
_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "task_type": _is_text,
    "lora_dropout": lambda value: (number := finite_number(value)) is not None and 0 <= number <= 1,
    "fan_in_fan_out": lambda value: type(value) is bool,
    **TARGETS,
}


def carried_fields(adapter: Adapter) -> Fields:
    """The fields that have to be stored with an adapter: of its own PEFT configuration, else those it was read with."""
    own = lora_fields(adapter.config or {}) if adapter.format == "peft" else adapter.peft_fields
    fields = valid_fields(own)
    return {name: value for name, value in fields.items() if not (adapter.narrowed and name in TARGETS)}


def valid_fields(fields: Any) -> dict[str, Any]:
    """The known fields with valid values; fields that are null are left out."""
    if not isinstance(fields, Mapping):
        return {}
    return {name: fields[name] for name, fits in _FIELDS.items() if fields.get(name) is not None and fits(fields[name])}


AGREE = 1e-6  # relative; α is stored as float32, which rounds it by up to 6e-8

# The fields of a `Scaling` under the keys that they have in files. The keys stay if a field gets another name.
SCALING_KEYS = ("rule", "alpha", "rank", "origin")

Record = Fields  # the JSON object that `stamp` writes


def stamp(stored: Stored, adapter: Adapter, back: Adapter) -> Stored:
    """Add a record of the names and scales that the modules have in ``adapter``.

    ``back`` is the result of reading ``stored`` again. If a writer folded a scale into the factors, the scale of the
    file differs from that of the adapter, and the record has the scale of the file.
    """
    # The record is looked up by the names in the file, which the writer may have had to change.
    canonical = {name: name for name in adapter} | {new: file for file, new in stored.names.items()}
    modules = {}
    for name, module in adapter.items():
        file = canonical[name]
        # The record says what the factors of the file need, not what the adapter had.
        written = back.modules.get(file, module)
        folded = abs(written.scale - module.scale) > AGREE * abs(module.scale)
        true = written if folded and written.scaling.formula != "unknown" else module
        scaling = dict(zip(SCALING_KEYS, astuple(true.scaling), strict=True))
        modules[file] = {"name": name, "scale": true.scale, "scaling": scaling}
    record = {
        "version": __version__,
        "format": back.format,
        "source": adapter.format,
        "base_model": adapter.base_model,
        "modules": modules,
        **({"peft": dict(fields)} if (fields := carried_fields(adapter)) else {}),
    }
    text = json_text(record)
    return replace(stored, metadata={**(stored.metadata or {}), RECORD: text})


def read_record(stored: Stored, file: Path | None = None) -> Record | None:
    """The record in the metadata of a file, or in ``loralens.json`` beside a pickle.

    None if there is none, or if it is damaged: the adapter can be read without it.
    """
    if file and is_pickle(file):
        record_file = file.with_name(f"{RECORD}.json")
        return read_json(record_file) if os.path.lexists(record_file) else None
    parsed = json_or_none((stored.metadata or {}).get(RECORD))
    return parsed if isinstance(parsed, dict) else None


def apply(adapter: Adapter, record: Record | None) -> Adapter:
    """``adapter`` with the names and scales of a record, as far as the file still agrees with the record."""
    record = record or {}
    modules = _modules(record, adapter)
    # A record that cannot be used at all does not change anything.
    if not modules:
        return adapter
    named: dict[str, Update] = {}
    doubts = []
    for file, module in adapter.items():
        entry = modules.get(file)
        if entry is None:
            named[file] = module
            continue
        scale = float(entry["scale"])
        # A dialect that stores no scale cannot disagree, so the record counts.
        if module.scaling.formula != "unknown" and abs(module.scale - scale) > AGREE * abs(scale):
            doubts.append(entry["name"])
        else:
            module = module.rescaled(scale, Scaling(*(entry["scaling"][key] for key in SCALING_KEYS)))
        named[entry["name"]] = module
    extra = {
        key: replace(item, module=modules[item.module]["name"]) if item.module in modules else item
        for key, item in adapter.extra.items()
    }
    scales_known = all(module.scaling.formula != "unknown" for module in named.values())
    findings = [f for f in adapter.findings if not (scales_known and f.code == "alpha-unknown")]
    if doubts:
        which = f"{len(doubts)} modules, {doubts[0]} among them,"
        text = f"{which} have another scale than the record of their conversion says"
        fix = "nothing, if the file was changed on purpose: its own scale is used"
        findings.append(Finding("warning", "record-disagrees", text, fix))
    base = adapter.base_model or plain_text(record.get("base_model"))
    # Targets name modules, so they are valid only as long as the modules of the file are those of the record.
    complete = modules.keys() == adapter.modules.keys()
    recorded = {n: value for n, value in valid_fields(record.get("peft")).items() if complete or n not in TARGETS}
    fields = {**adapter.peft_fields, **recorded}
    return replace(adapter, modules=named, extra=extra, findings=tuple(findings), base_model=base, peft_fields=fields)


def _modules(record: Record, files: Iterable[str]) -> Fields:
    """The modules in a record; none if it is damaged, or if two modules of the file would get the same name."""
    modules = record.get("modules")
    if not isinstance(modules, dict) or not all(map(_is_valid, modules.values())):
        return {}
    names = [modules[file]["name"] if file in modules else file for file in files]
    return modules if len(set(names)) == len(names) else {}


def _is_valid(module: Any) -> bool:
    """Whether an entry has all fields with values of the right types: finite numbers, and text that can be shown."""
    scaling = module.get("scaling") if isinstance(module, dict) else None
    if not isinstance(scaling, dict) or set(scaling) != set(SCALING_KEYS):
        return False
    formula, alpha, rank, origin = (scaling[key] for key in SCALING_KEYS)
    return (
        plain_text(module.get("name")) is not None
        and finite_number(module.get("scale")) is not None
        and formula in get_args(ScaleFormula)
        and (alpha is None or finite_number(alpha) is not None)
        and (rank is None or (type(rank) is int and rank > 0))
        and is_safe_text(origin)
    )
