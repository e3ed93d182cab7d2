"""JSON Schemas of results, from the keys and the columns that they declare, and from the types of their attributes."""

import sys
from collections.abc import Mapping, Sequence
from inspect import get_annotations, getattr_static, signature
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from loralens.tables.numbers import as_text
from loralens.tables.table import Column, Keys, Recorded, Rows

SIMPLE = {bool: "boolean", int: "integer", str: "string", NoneType: "null"}


def schema_of(kind: Any) -> dict[str, Any]:
    """Return the JSON Schema of a type: of a class with ``json_keys``, a type of Python, `Rows`, or a dict of types."""
    if isinstance(kind, Rows):
        return {"type": "array", "items": _object(kind.columns, kind.row)}
    if isinstance(kind, list):
        return _any_of([schema_of(inner) for inner in kind])
    if isinstance(kind, tuple) and not hasattr(kind, "_fields"):
        return {"type": "array", "items": schema_of(kind[0])}
    if isinstance(kind, dict):
        properties = {key.removesuffix("?"): schema_of(inner) for key, inner in kind.items()}
        return _fixed(properties, [key for key in kind if not key.endswith("?")])
    return _schema_of_type(kind)


def _schema_of_type(kind: Any) -> dict[str, Any]:
    arguments = get_args(kind)
    if kind in SIMPLE or kind is None:
        return {"type": SIMPLE.get(kind, "null")}
    # JSON has neither NaN nor infinity, so a number that is not defined is null.
    if kind is float:
        return {"type": ["number", "null"]}
    match get_origin(kind) or kind:
        case origin if origin is Literal:
            return {"enum": list(arguments)}
        case origin if origin in (Union, UnionType):
            return _any_of([schema_of(inner) for inner in arguments])
        case type() as origin if issubclass(origin, Recorded):
            return _object(origin.json_keys(), origin)
        case type() as origin if hasattr(origin, "_fields"):
            return schema_of(get_type_hints(origin))
        case type() as origin if issubclass(origin, Mapping):
            return {"type": "object"} | ({"additionalProperties": schema_of(arguments[1])} if arguments else {})
        case type() as origin if issubclass(origin, Sequence):
            inner = [schema_of(each) for each in dict.fromkeys(arguments) if each is not ...]
            return {"type": "array"} | ({"items": _any_of(inner)} if inner else {})
        # Everything else is text in JSON.
        case type() as origin if origin not in (Any, object):
            return {"type": "string"}
    return {}


def _any_of(schemas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One schema for what fits any of these; simple types stand in one list."""
    if all(each.keys() == {"type"} for each in schemas):
        words = [word for each in schemas for word in (each["type"],) * isinstance(each["type"], str) or each["type"]]
        names = list(dict.fromkeys(words))
        return {"type": names[0] if len(names) == 1 else names}
    return schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}


def _fixed(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _object(keys: Keys, owner: Any) -> dict[str, Any]:
    """The schema of an object with these keys, which are read from ``owner``: a class, or a path from one."""
    schema = _fixed({}, [])
    for column in (Column(key) if isinstance(key, str) else key for key in keys if key != "*"):
        path = (column.key,) if isinstance(column.key, str) else column.key
        place = schema
        for depth, key in enumerate(path if column.json else (), start=1):
            if not column.may_lack and key not in place["required"]:
                place["required"].append(key)
            inner = schema_of(_column_type(column, owner)) if depth == len(path) else _fixed({}, [])
            place = place["properties"].setdefault(key, inner)
    return schema | ({"additionalProperties": True} if "*" in keys else {})


def _column_type(column: Column[Any], owner: Any) -> Any:
    """The type of the values of a column: the declared one, that of the attributes, or what its text takes."""
    if isinstance(column.type, Rows) and isinstance(column.type.row, str):
        arguments = get_args(type_at(owner, column.type.row))
        return column.type._replace(row=arguments[0])
    if column.type is not None:
        return column.type
    if isinstance(column.source, str) and owner is not None:
        return type_at(owner, column.source or column.name)
    if column.text is as_text or not hasattr(column.text, "__annotations__"):
        return str if column.text is as_text and (column.align == "left" or not column.title) else int
    return next(iter(signature(column.text).parameters.values())).annotation


def type_at(owner: Any, path: str) -> Any:
    """Return the declared type at a path from a class, as `follow` goes it; None is possible where a part may be it."""
    kind, optional = owner, False
    for name in path.split("."):
        if get_origin(kind) in (Union, UnionType):
            optional = optional or NoneType in get_args(kind)
            kind = next(each for each in get_args(kind) if each is not NoneType)
        arguments = get_args(kind)
        member = getattr_static(kind, name, None)
        if name == "len":
            kind = int
        elif name.isdigit():
            kind = arguments[int(name) if len(arguments) > 1 and ... not in arguments else 0]
        elif get_origin(kind) in (dict, Mapping):
            kind = arguments[1]
        elif function := getattr(member, "fget", getattr(member, "func", None)):  # a property, perhaps a cached one
            kind = get_type_hints(function)["return"]
        else:
            # One annotation alone, as others may name what is imported for type checkers only.
            base = next(base for base in kind.__mro__ if name in get_annotations(base))
            one = SimpleNamespace(__annotations__={name: base.__annotations__[name]})
            kind = get_type_hints(one, vars(sys.modules[base.__module__]))[name]
    return kind | None if optional else kind
