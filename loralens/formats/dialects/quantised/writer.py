"""Writing ``loralens-q``: modules that are in few bits already as they are, others rounded while they are written."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any, TypeVar

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.quantised import NAME, PART, as_bytes, direction_bits, direction_bytes
from loralens.core.structured import Update
from loralens.errors import OptionError, place
from loralens.formats.dialects.quantised.reader import EXTRA, VERSION, description
from loralens.formats.files.container import Stored
from loralens.linalg.quantise import quantise_product

Bits = int | Mapping[str, Sequence[int]]
Kind = TypeVar("Kind")


def write(adapter: Adapter, *, bits: Bits = 8) -> Stored:
    """The adapter as ``loralens-q`` stores it.

    Parameters
    ----------
    adapter : Adapter
    bits : int or mapping of str to sequence of int
        Of modules that are not in whole numbers yet: of every direction, or by module of each leading direction,
        largest first. Their factors are read and rounded when their bytes are.

    Raises
    ------
    OptionError
        Bits outside 2 to 16, of more directions than there are, or of a module that is none.
    MismatchError
        A module that is no pair (LoKr, LoHa, a full difference).
    """
    if not isinstance(bits, int):
        for name in sorted(set(bits) - set(adapter)):
            raise OptionError(f"bits for {name}, and there is no such module", fix="give the names of modules")
    tensors, modules = {}, {}
    scalings: list[Any] = []
    layouts: list[Any] = []
    for name, module in adapter.items():
        with place(name):
            rank, tensors[f"{name}.{PART}"] = _bytes(module, bits if isinstance(bits, int) else bits.get(name, 8))
        scaling = _number([module.scale, *astuple(module.scaling)], scalings)
        kind = astuple(module.layout)
        layout = _number(_jsonable(kind if module.layout.rows else kind[:-1]), layouts)
        modules[name] = [*module.shape, rank, scaling, layout]
    tensors |= {EXTRA + key: extra.tensor for key, extra in adapter.extra.items()}
    again = description(adapter.metadata) if adapter.format == NAME and NAME in (adapter.metadata or {}) else None
    said = {
        "version": VERSION,
        "source": again["source"] if again else adapter.format,
        "base_model": adapter.base_model,
        "modules": modules,
        "scalings": scalings,
        "layouts": layouts,
        "extra": {key: [extra.role, extra.module, extra.parameter] for key, extra in adapter.extra.items()},
        "findings": [[f.level, f.code, f.text, f.fix] for f in adapter.findings],
        "config": _jsonable(adapter.config),
        "metadata": again["metadata"] if again else _jsonable(adapter.metadata),
        "narrowed": adapter.narrowed,
        **({"peft": dict(adapter.peft_fields)} if adapter.peft_fields else {}),
    }
    metadata = dict(adapter.metadata or {}) if again else {"format": NAME}
    if again is None or _resolved(said) != _resolved(again):
        metadata[NAME] = json.dumps(said, separators=(",", ":"))
    return Stored(tensors, metadata)


def _bytes(module: Update, bits: int | Sequence[int]) -> tuple[int, LazyArray]:
    """How many directions a module is stored in, and the bytes that hold them."""
    if module.origin and module.origin.format == NAME:
        (data,) = module.origin.tensors.values()
        return module.rank, data
    pair = LowRank(*module.factors)
    kept = direction_bits(pair, bits)

    def rounded() -> Array:
        return as_bytes(quantise_product(pair.B, pair.A, np.array(kept)))

    size = sum(direction_bytes(pair.shape, b) for b in kept)
    return len(kept), LazyArray(rounded, shape=(size,), dtype=np.uint8)


def _number(kind: Kind, known: list[Kind]) -> int:
    """The place of ``kind`` among the known ones, to which it is added where it is new."""
    if kind not in known:
        known.append(kind)
    return known.index(kind)


def _resolved(said: Mapping[str, Any]) -> dict[str, Any]:
    """A description with every kind at its place, in whatever order the kinds were listed."""
    modules = {
        name: [*rest, said["scalings"][scaling], said["layouts"][layout]]
        for name, (*rest, scaling, layout) in said["modules"].items()
    }
    return {**said, "modules": modules, "scalings": None, "layouts": None}


def _jsonable(value: Any) -> Any:
    """``value`` as JSON gives it back: lists for tuples, plain mappings."""
    if isinstance(value, Mapping):
        return {key: _jsonable(inner) for key, inner in value.items()}
    return [_jsonable(inner) for inner in value] if isinstance(value, list | tuple) else value
