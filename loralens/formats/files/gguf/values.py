"""GGUF's key-values and their form in the metadata of an adapter.

Metadata map text to text, while GGUF's values have types, and llama.cpp refuses a u32 where it expects an f32. So the
type is appended to the key, and the value is JSON::

    general.architecture                  llama
    adapter.lora.alpha:f32                16.0
    adapter.alora.invocation_tokens:u32[] [64, 512]

A text keeps its plain key, unless the key itself contains a colon: then it is ``key:str``.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from loralens.core.stored import parse_json
from loralens.errors import FormatError, place

SCALARS = {  # type in the file → name and struct code
    0: ("u8", "B"), 1: ("i8", "b"), 2: ("u16", "H"), 3: ("i16", "h"), 4: ("u32", "I"), 5: ("i32", "i"),
    6: ("f32", "f"), 7: ("bool", "?"), 10: ("u64", "Q"), 11: ("i64", "q"), 12: ("f64", "d"),
}  # fmt: skip
TEXT, ARRAY = 8, 9  # GGUF's numbers of these types
CODES = {name: code for code, (name, _) in SCALARS.items()} | {"str": TEXT}
NAMES = {code: name for name, code in CODES.items()}
_PACKING = dict(SCALARS.values())
_FIX = "take the value out of the metadata, or read the file again"


class Value(NamedTuple):
    """One value: the name of its type, whether it is an array of them, and the value itself."""

    kind: str
    array: bool
    value: Any


def to_text(key: str, value: Value) -> tuple[str, str]:
    """The key and the text of a value in the metadata."""
    if value.kind == "str" and not value.array and ":" not in key:
        return key, value.value
    suffix = f"{value.kind}[]" if value.array else value.kind
    text = value.value if suffix == "str" else json.dumps(value.value, ensure_ascii=False)
    return f"{key}:{suffix}", text


def from_text(key: str, text: str) -> tuple[str, Value]:
    """The key and the value that a text in the metadata stands for.

    Raises
    ------
    FormatError
        GGUF has no such type, or the text is not a value of it.
    """
    name, colon, suffix = key.rpartition(":")
    if not colon:
        return key, Value("str", array=False, value=text)
    kind, array = suffix.removesuffix("[]"), suffix.endswith("[]")
    if kind not in CODES:
        raise FormatError(f"{key}: {kind[:20]!a} is not a type of GGUF", fix=_FIX)
    if suffix == "str":
        return name, Value("str", array=False, value=text)
    with place(key):
        try:
            value = parse_json(text)
        except ValueError as error:
            raise FormatError(f"{text[:40]!a} is not valid JSON", fix=_FIX) from error
        # A text from outside may hold a list where a number is expected.
        items = value if array and isinstance(value, list) else [value]
        if (array and not isinstance(value, list)) or not all(_fits(kind, item) for item in items):
            raise FormatError(f"{text[:40]!a} cannot be stored as {suffix}", fix=_FIX)
    return name, Value(kind, array, value)


def _fits(kind: str, item: Any) -> bool:
    if kind == "str":
        return isinstance(item, str)
    if isinstance(item, bool) or kind == "bool":  # struct would pack True as the number 1
        return isinstance(item, bool) and kind == "bool"
    try:
        struct.pack(f"<{_PACKING[kind]}", item)
    except (struct.error, OverflowError, TypeError):
        return False
    return True


def plain_values(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The values of metadata by their key in the file, without their types."""
    values = (from_text(key, text) for key, text in (metadata or {}).items())
    return {key: value.value for key, value in values}


def value_size(value: Value) -> int:
    """The bytes of a value in the file: its type and its content, without the key."""
    # A text has its length (8) before it; an array has the type of its items (4) and their number (8).
    items = value.value if value.array else [value.value]
    sizes = [8 + len(item.encode()) if value.kind == "str" else struct.calcsize(_PACKING[value.kind]) for item in items]
    return 4 + (12 if value.array else 0) + sum(sizes)
