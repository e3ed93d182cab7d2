"""What loralens writes into the metadata of a file it converts: names and scales that the dialect cannot say.

A kohya file has no dots in its names, a loralib file no α. Under the key ``loralens`` stands, for every module as the
file calls it, its canonical name, scale and where that came from, so that loralens reads its own files back without
``--base`` or ``--alpha``. A record is believed only as far as the file agrees: a module that has gone, or another
scale than the record says (somebody else changed the file), is taken from the file.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from loralens.core.adapter import Adapter, Finding
from loralens.core.scaling import Rule, Scaling
from loralens.core.structured import Update
from loralens.formats.container import RECORD, Stored, read_json
from loralens.formats.location import is_pickle
from loralens.version import __version__

AGREE = 1e-6  # relative: α is stored as float32


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
    }
    text = json.dumps(record, ensure_ascii=False)
    return replace(stored, metadata={**(stored.metadata or {}), RECORD: text})


def _folded(module: Update, written: Update) -> bool:
    return written.scaling.rule != "unknown" and abs(written.scale - module.scale) > AGREE * abs(module.scale)


def of(stored: Stored, file: Path) -> str | None:
    """The record of a file: in its metadata, or in ``loralens.json`` beside a pickle."""
    if not is_pickle(file):
        return (stored.metadata or {}).get(RECORD)
    beside = file.with_name(f"{RECORD}.json")
    return json.dumps(read_json(beside)) if beside.is_file() else None


def format_of(record: str) -> str | None:
    """The dialect that a record says its file was written in."""
    try:
        form = json.loads(record)["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return form if isinstance(form, str) else None


def apply(adapter: Adapter, record: str | None) -> Adapter:
    """``adapter`` with the names and scales of a record, as far as the file still agrees with it."""
    modules = _modules(record)
    if not modules:
        return adapter
    named: dict[str, Update] = {}
    doubts = []
    for file, module in adapter.items():
        said = modules.get(file)
        if said is None:
            named[file] = module
            continue
        if module.scaling.rule != "unknown" and abs(module.scale - said["scale"]) > AGREE * abs(said["scale"]):
            doubts.append(said["name"])
        else:
            module = module.rescaled(said["scale"], _scaling(said["scaling"]))
        named[said["name"]] = module
    extra = {
        key: replace(one, module=modules[one.module]["name"]) if one.module in modules else one
        for key, one in adapter.extra.items()
    }
    findings = [f for f in adapter.findings if f.code != "alpha-unknown"] + _doubts(doubts)
    base = adapter.base_model or json.loads(record or "{}").get("base_model")
    return replace(adapter, modules=named, extra=extra, findings=tuple(findings), base_model=base)


def _modules(record: str | None) -> Mapping[str, Any]:
    """The modules of a record that is one; nothing where it is damaged: it is a help, not the adapter."""
    try:
        modules = json.loads(record)["modules"] if record else {}
        good = isinstance(modules, dict) and all(map(_sound, modules.values()))
        names = [module["name"] for module in modules.values()] if good else []
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return modules if good and len(set(names)) == len(names) else {}


def _sound(module: Any) -> bool:
    scaling = module["scaling"]
    return (
        isinstance(module["name"], str)
        and isinstance(module["scale"], int | float)
        and set(scaling) == {"rule", "alpha", "rank", "origin"}
        and scaling["rule"] in get_args(Rule)
        and isinstance(scaling["alpha"], int | float | None)
        and isinstance(scaling["rank"], int | None)
        and isinstance(scaling["origin"], str)
    )


def _scaling(said: Mapping[str, Any]) -> Scaling:
    return Scaling(said["rule"], said["alpha"], said["rank"], said["origin"])


def _doubts(names: list[str]) -> list[Finding]:
    if not names:
        return []
    text = f"{len(names)} modules, {names[0]} among them, have another scale than the record of their conversion says"
    return [Finding("warning", "record-disagrees", text, "the file was changed since; its own scale is taken")]
