"""Writing ``loralens-q``: modules in few bits are copied, and others are quantised while they are written."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any, TypeVar

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.few_bits.quantised import NAME, PART, as_bytes, direction_bits, direction_bytes
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.structured import Update
from loralens.errors import OptionError, place
from loralens.formats.dialects.quantised.reader import EXTRA, VERSION, description
from loralens.formats.files.container import Stored
from loralens.linalg.few_bits.quantise import quantise_product

Bits = int | Mapping[str, Sequence[int]]
Kind = TypeVar("Kind")


def write(adapter: Adapter, *, bits: Bits = 8) -> Stored:
    """The adapter as ``loralens-q`` stores it.

    Parameters
    ----------
    adapter : Adapter
    bits : int or mapping of str to sequence of int
        For modules that are not quantised yet: the bits of every direction, or by module the bits of each leading
        direction, the largest first. The factors are read and quantised when the bytes of the module are needed.

    Raises
    ------
    OptionError
        Bits are outside of 2 to 16, or there are more of them than directions, or a module does not exist.
    MismatchError
        A module is not a pair (LoKr, LoHa, a full difference).
    """
    # A name that does not exist would be ignored without an error.
    if not isinstance(bits, int):
        for name in sorted(set(bits) - set(adapter)):
            raise OptionError(f"bits for {name}, but there is no such module", fix="give the names of modules")
    tensors, ranks = {}, {}
    for name, module in adapter.items():
        with place(name):
            module_bits = bits if isinstance(bits, int) else bits.get(name, 8)
            ranks[name], tensors[f"{name}.{PART}"] = _bytes(module, module_bits)
    tensors |= {EXTRA + key: extra.tensor for key, extra in adapter.extra.items()}
    # A file that was loralens-q before keeps the source and the metadata of its first conversion.
    again = description(adapter.metadata) if adapter.format == NAME and NAME in (adapter.metadata or {}) else None
    fields = describe(adapter, ranks)
    if again:
        fields |= {"source": again["source"], "metadata": again["metadata"]}
    metadata = dict(adapter.metadata or {}) if again else {"format": NAME}
    # If nothing changed, the text of the old description is kept, so that the file stays the same byte for byte.
    if again is None or _resolve_kinds(fields) != _resolve_kinds(again):
        metadata[NAME] = json.dumps(fields, separators=(",", ":"))
    return Stored(tensors, metadata)


def describe(adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Everything about an adapter but its numbers, as JSON values; ``ranks`` are those of the stored modules."""
    modules = {}
    scalings: list[Any] = []
    layouts: list[Any] = []
    for name, module in adapter.items():
        scaling = _number([module.scale, *astuple(module.scaling)], scalings)
        kind = astuple(module.layout)
        # The order of rows is written only where it is not the usual one: older readers know four entries.
        layout = _number(_to_json(kind if module.layout.rows else kind[:-1]), layouts)
        modules[name] = [*module.shape, ranks[name], scaling, layout]
    return {
        "version": VERSION,
        "source": adapter.format,
        "base_model": adapter.base_model,
        "modules": modules,
        "scalings": scalings,
        "layouts": layouts,
        "extra": {key: [extra.role, extra.module, extra.parameter] for key, extra in adapter.extra.items()},
        "findings": [[f.level, f.code, f.text, f.fix] for f in adapter.findings],
        "config": _to_json(adapter.config),
        "metadata": _to_json(adapter.metadata),
        "narrowed": adapter.narrowed,
        **({"peft": dict(adapter.peft_fields)} if adapter.peft_fields else {}),
    }


def _bytes(module: Update, bits: int | Sequence[int]) -> tuple[int, LazyArray]:
    """The number of directions that are stored for a module, and their bytes."""
    # Quantising once more would add a second error.
    if module.origin and module.origin.format == NAME:
        (data,) = module.origin.tensors.values()
        return module.rank, data
    # Without the scale, which is stored in the description.
    pair = LowRank(*module.factors)
    bits_of_each = direction_bits(pair, bits)

    def round_pair() -> Array:
        return as_bytes(quantise_product(pair.B, pair.A, np.array(bits_of_each)))

    size = sum(direction_bytes(pair.shape, b) for b in bits_of_each)
    return len(bits_of_each), LazyArray(round_pair, shape=(size,), dtype=np.uint8)


def _number(kind: Kind, kinds: list[Kind]) -> int:
    """The index of ``kind`` in the list ``kinds``, to which it is added if it is new."""
    if kind not in kinds:
        kinds.append(kind)
    return kinds.index(kind)


def _resolve_kinds(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A description with kinds in place of their numbers, so that descriptions with other numbers can be compared."""
    modules = {
        name: [*head, fields["scalings"][scaling], fields["layouts"][layout]]
        for name, (*head, scaling, layout) in fields["modules"].items()
    }
    return {**fields, "modules": modules, "scalings": None, "layouts": None}


def _to_json(value: Any) -> Any:
    """``value`` as it would be read from JSON: with lists for tuples, and plain dicts."""
    if isinstance(value, Mapping):
        return {key: _to_json(inner) for key, inner in value.items()}
    return [_to_json(inner) for inner in value] if isinstance(value, list | tuple) else value
