"""Fields of PEFT's configuration that survive a conversion to another dialect and back.

``task_type``, dropout and targets mean nothing to kohya's software or llama.cpp, but they are needed to continue
training in PEFT. `loralens.formats.dialects.record` stores them in converted files, and PEFT's writer uses them again.
"""

from collections.abc import Callable, Mapping
from typing import Any

from loralens.core.adapter import Adapter
from loralens.formats.dialects.peft.types import lora_fields
from loralens.formats.files.json_text import NAME_LIMIT, finite_number, plain_text


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


def carried_fields(adapter: Adapter) -> Mapping[str, Any]:
    """The fields that have to be stored with an adapter: of its own PEFT configuration, else those it was read with."""
    own = lora_fields(adapter.config or {}) if adapter.format == "peft" else adapter.peft_fields
    fields = valid_fields(own)
    return {name: value for name, value in fields.items() if not (adapter.narrowed and name in TARGETS)}


def valid_fields(fields: Any) -> dict[str, Any]:
    """The known fields with valid values; fields that are null are left out."""
    if not isinstance(fields, Mapping):
        return {}
    return {name: fields[name] for name, fits in _FIELDS.items() if fields.get(name) is not None and fits(fields[name])}
