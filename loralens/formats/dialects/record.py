"""What loralens writes into the metadata of a file it converts: names and scales that the dialect cannot say.

A kohya file has no dots in its names, a loralib file no α. Under the key ``loralens`` stands, for every module as the
file calls it, its canonical name, scale and where that came from, so that loralens reads its own files back without
``--base`` or ``--alpha``. A record is believed only as far as the file agrees: a module that has gone, or another
scale than the record says (somebody else changed the file), is taken from the file. Beside them stands what PEFT's
configuration said of the training: task, dropout, targets (`peft_fields`).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from loralens.core.adapter import Adapter, Finding
from loralens.core.scaling import Rule, Scaling
from loralens.core.structured import Update
from loralens.formats.dialects.peft.fields import TARGETS, fields_of, sound
from loralens.formats.files.container import RECORD, Stored, harmless, json_text, plain_text, read_json
from loralens.formats.files.location import is_pickle
from loralens.formats.files.number import finite
from loralens.version import __version__

AGREE = 1e-6  # relative: α is stored as float32

Record = Mapping[str, Any]  # the JSON object that `stamp` writes


def stamp(stored: Stored, adapter: Adapter, back: Adapter) -> Stored:
    """``stored`` with a record of what ``adapter`` called its modules and of their scales.

    ``back`` is what the dialect's reader makes of ``stored``: where a writer folded a scale into the factors, the file
    has another scale than the adapter had, and the record says the file's.
    """
    canonical = {name: name for name in adapter} | {new: file for file, new in stored.names.items()}
    modules = {}
    for name, module in adapter.items():
        file = canonical[name]
        true = back[file] if file in back and _folded(module, back[file]) else module
        modules[file] = {"name": name, "scale": true.scale, "scaling": asdict(true.scaling)}
    record = {
        "version": __version__,
        "format": back.format,
        "source": adapter.format,
        "base_model": adapter.base_model,
        "modules": modules,
        **({"peft": dict(fields)} if (fields := fields_of(adapter)) else {}),
    }
    text = json_text(record)
    return replace(stored, metadata={**(stored.metadata or {}), RECORD: text})


def _folded(module: Update, written: Update) -> bool:
    return written.scaling.rule != "unknown" and abs(written.scale - module.scale) > AGREE * abs(module.scale)


def of(stored: Stored, file: Path) -> Record | None:
    """The record of a file: in its metadata, or in ``loralens.json`` beside a pickle.

    None where there is none, or where the metadata hold a damaged one: it is a help, not the adapter.
    """
    if is_pickle(file):
        beside = file.with_name(f"{RECORD}.json")
        return read_json(beside) if beside.is_file() else None
    return _in_metadata(stored)


def _in_metadata(stored: Stored) -> Record | None:
    try:
        said = json.loads((stored.metadata or {}).get(RECORD, "null"))
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def format_of(record: Record | None) -> str | None:
    """The dialect that a record says its file was written in."""
    form = (record or {}).get("format")
    return form if isinstance(form, str) else None


def apply(adapter: Adapter, record: Record | None) -> Adapter:
    """``adapter`` with the names and scales of a record, as far as the file still agrees with it."""
    record = record or {}
    modules = _modules(record, adapter)
    if not modules:
        return adapter
    named: dict[str, Update] = {}
    doubts = []
    for file, module in adapter.items():
        said = modules.get(file)
        if said is None:
            named[file] = module
            continue
        scale = float(said["scale"])
        if module.scaling.rule != "unknown" and abs(module.scale - scale) > AGREE * abs(scale):
            doubts.append(said["name"])
        else:
            module = module.rescaled(scale, Scaling(**said["scaling"]))
        named[said["name"]] = module
    extra = {
        key: replace(one, module=modules[one.module]["name"]) if one.module in modules else one
        for key, one in adapter.extra.items()
    }
    known = all(module.scaling.rule != "unknown" for module in named.values())
    findings = [f for f in adapter.findings if not (known and f.code == "alpha-unknown")] + _doubts(doubts)
    base = adapter.base_model or plain_text(record.get("base_model"))
    fields = {**adapter.peft_fields, **_fields(record, modules.keys() == adapter.modules.keys())}
    return replace(adapter, modules=named, extra=extra, findings=tuple(findings), base_model=base, peft_fields=fields)


def applied(adapter: Adapter, stored: Stored) -> Adapter:
    """``adapter``, which a dialect reads from ``stored``, with the names and scales of the record in its metadata."""
    return apply(adapter, _in_metadata(stored))


def _fields(record: Record, whole: bool) -> dict[str, Any]:
    """What a record says of a PEFT configuration; of the targets only where the file has the modules that it had."""
    return {name: value for name, value in sound(record.get("peft")).items() if whole or name not in TARGETS}


def _modules(record: Record, files: Iterable[str]) -> Mapping[str, Any]:
    """What a record says of the modules of a file; nothing where it is damaged, or gives two of them one name."""
    modules = record.get("modules")
    if not isinstance(modules, dict) or not all(map(_sound, modules.values())):
        return {}
    names = [modules[file]["name"] if file in modules else file for file in files]
    return modules if len(set(names)) == len(names) else {}


def _sound(module: Any) -> bool:
    """Whether an entry has all its fields, each of its kind: numbers finite, text that may go to a terminal."""
    scaling = module.get("scaling") if isinstance(module, dict) else None
    if not isinstance(scaling, dict) or set(scaling) != {"rule", "alpha", "rank", "origin"}:
        return False
    rule, alpha, rank = scaling["rule"], scaling["alpha"], scaling["rank"]
    return (
        plain_text(module.get("name")) is not None
        and finite(module.get("scale")) is not None
        and rule in get_args(Rule)
        and (alpha is None or finite(alpha) is not None)
        and (rank is None or (type(rank) is int and rank > 0))
        and harmless(scaling["origin"])
    )


def _doubts(names: list[str]) -> list[Finding]:
    if not names:
        return []
    text = f"{len(names)} modules, {names[0]} among them, have another scale than the record of their conversion says"
    return [Finding("warning", "record-disagrees", text, "the file was changed since; its own scale is taken")]
