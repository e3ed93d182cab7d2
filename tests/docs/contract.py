"""Contracts: a JSON value that describes others, with the words of a type where they have a value.

``{"name": "string", "shape": ["integer"], "loss": "number | null"}``. A list has one element that describes all; an
object whose keys are data has one key in angle brackets; between two kinds that a value may have stands "|"; "?" ends
the name of a key that may be missing, "| null" that of one whose object or array may be null.
"""

from typing import Any

TYPES = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
}


def breaches(contract: Any, value: Any, at: str = "$") -> list[str]:
    """Where a value does not keep its contract: a key that is missing, one that is not described, another type."""
    if isinstance(contract, str):
        kinds = [kind.strip() for kind in contract.split("|")]
        unknown = [kind for kind in kinds if kind not in TYPES]
        if unknown:
            return [f"{at}: the contract says {unknown[0]!r}, which is no type"]
        return [] if any(TYPES[kind](value) for kind in kinds) else [f"{at}: {value!r:.60} is not {contract}"]
    if isinstance(contract, list):
        if not isinstance(value, list):
            return [f"{at}: {value!r:.60} is no array"]
        return [line for i, one in enumerate(value) for line in breaches(contract[0], one, f"{at}[{i}]")]
    if not isinstance(value, dict):
        return [f"{at}: {value!r:.60} is no object"]
    if len(contract) == 1 and next(iter(contract)).startswith("<"):
        (inner,) = contract.values()
        return [line for key, one in value.items() for line in breaches(inner, one, f"{at}.{key}")]
    missing, inside = [], []
    for key, inner in contract.items():
        name = key.removesuffix(" | null").removesuffix("?")
        if name not in value:
            missing += [] if "?" in key else [f"{at}.{name} is described, and missing"]
        elif value[name] is not None or not key.endswith(" | null"):
            inside += breaches(inner, value[name], f"{at}.{name}")
    known = {key.removesuffix(" | null").removesuffix("?") for key in contract}
    return missing + [f"{at}.{key} is there, and not described" for key in value if key not in known] + inside
