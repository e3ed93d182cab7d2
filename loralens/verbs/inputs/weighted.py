"""Adapters with weights: ``(adapter, 0.7)`` or ``{adapter: 0.7}``; the shell writes ``ADAPTER:0.7``."""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from numbers import Real
from os import PathLike
from typing import Any

from loralens.core.adapter import Adapter
from loralens.errors import OptionError
from loralens.verbs.inputs.adapters import AdapterSource, sources

Pair = tuple[AdapterSource, float]
Weighted = AdapterSource | Pair | Sequence[AdapterSource | Pair] | Mapping[Any, float]


def weighted_sources(adapters: Iterable[Weighted]) -> list[Pair]:
    """The adapters of ``verb("a", ("b", 0.3))``, ``verb(["a", "b"])`` and ``verb({"a": 0.7, "b": 0.3})`` with weights.

    An adapter without a weight counts once.

    Raises
    ------
    OptionError
        There is none, something is neither a path nor an adapter, or a weight is no finite number.
    """
    pairs = [pair for source in adapters for pair in _pairs(source)]
    for _, weight in pairs:
        if not isinstance(weight, Real) or not isfinite(weight):
            raise OptionError(f"a weight cannot be {weight!r}", fix="give a finite number")
    checked = sources([[adapter for adapter, _ in pairs]])
    return [(adapter, float(weight)) for adapter, (_, weight) in zip(checked, pairs, strict=True)]


def _pairs(source: Any) -> list[tuple[Any, Any]]:
    if isinstance(source, Mapping):
        return list(source.items())
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], Real):
        return [source]
    if isinstance(source, str | PathLike | Adapter) or not isinstance(source, Iterable):
        return [(source, 1.0)]
    return [pair for part in source for pair in _pairs(part)]
