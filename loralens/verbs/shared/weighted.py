"""Adapters with weights: ``(adapter, 0.7)`` or ``{adapter: 0.7}``; in the shell, ``ADAPTER:0.7``."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import isfinite
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

from loralens.core.adapter import Adapter
from loralens.core.stored import Ingredient, Strength
from loralens.errors import NOT_FINITE, FormatError, OptionError
from loralens.tables.numbers import number
from loralens.verbs.shared.adapters import AdapterSource, labels, sources

Weight = float | Mapping[str, float] | Strength  # a mapping: glob over modules → weight; 1 if none matches
Pair = tuple[AdapterSource, float]
# What Python may be given in place of ADAPTER:WEIGHT: one adapter, a pair, several of both, or a mapping.
Weighted = AdapterSource | Pair | Sequence[AdapterSource | Pair] | Mapping[Any, float]
StrengthPair = tuple[AdapterSource, Weight]
WithStrength = AdapterSource | StrengthPair | Sequence[AdapterSource | StrengthPair] | Mapping[Any, Weight]


def weighted_sources(adapters: Iterable[Weighted]) -> list[Pair]:
    """The adapters of ``verb("a", ("b", 0.3))``, ``verb(["a", "b"])`` and ``verb({"a": 0.7, "b": 0.3})`` with weights.

    An adapter without a weight has the weight 1.

    Raises
    ------
    OptionError
        There is no adapter, an argument is neither a path nor an adapter, or a weight is not a finite number.
    """
    return [(adapter, _finite(weight)) for adapter, weight in _sources_and_weights(adapters)]


@contextmanager
def name_damaged(adapters: Sequence[tuple[str, Adapter]]) -> Iterator[None]:
    """Add to an error of the block about NaN or Inf in a factor the adapters that hold such numbers in that module.

    Where several adapters are added up, the code that meets such a number knows the module only.
    """
    try:
        yield
    except FormatError as error:
        if error.what != NOT_FINITE:
            raise
        from loralens.analysis.inspection import holds_non_finite  # nothing else here needs it

        places = error.where

        def is_damaged(adapter: Adapter) -> bool:
            named = [module for name, module in adapter.modules.items() if name in places]
            # An adapter may spell the module in another way. Then all of its modules are looked through.
            return any(map(holds_non_finite, named or adapter.modules.values()))

        if damaged := [label for label, adapter in adapters if is_damaged(adapter)]:
            error.at(", ".join(damaged))
        raise


def weighted_label(label: str, weight: float) -> str:
    """An adapter in a sentence: ``chat``, or ``0.7 × chat``."""
    return label if weight == 1 else f"{number(weight, 6)} × {label}"


def sources_with_strengths(adapters: Iterable[WithStrength]) -> list[tuple[AdapterSource, Strength]]:
    """As `weighted_sources`, where a weight may also be a mapping of globs over modules: ``("b", {"v_proj": 0.3})``."""
    return [(adapter, _as_strength(weight)) for adapter, weight in _sources_and_weights(adapters)]


def strength_within(modules: Sequence[str], weight: float, *, elsewhere: float) -> Strength:
    """``weight`` in the modules of these globs and ``elsewhere`` in others; without globs ``weight`` in all modules."""
    return _check_strength(elsewhere, dict.fromkeys(modules, weight)) if modules else _check_strength(weight, {})


def ingredients(pairs: Sequence[tuple[AdapterSource, Strength]]) -> tuple[Ingredient, ...]:
    """The adapters of a recipe, named by their paths; objects are numbered."""
    names = labels([source for source, _ in pairs])
    return tuple(Ingredient(name, strength) for name, (_, strength) in zip(names, pairs, strict=True))


def label_of_taken(take: AdapterSource | None, pairs: Sequence[tuple[AdapterSource, Strength]]) -> str | None:
    """The name in a recipe of the adapter whose full tensors are used: as it was given, or the number of an object."""
    if not isinstance(take, Adapter):
        return None if take is None else str(take)
    # An object has no name, so it is found by identity.
    for place, (source, _) in enumerate(pairs, start=1):
        if source is take:
            return str(place)
    raise OptionError("take is an adapter that is not among those combined", fix="give one of them, or 'none'")


def _sources_and_weights(adapters: Iterable[Any]) -> list[tuple[AdapterSource, Any]]:
    pairs = [pair for source in adapters for pair in _as_pairs(source)]
    return list(zip(sources([[adapter for adapter, _ in pairs]]), [weight for _, weight in pairs], strict=True))


def _as_pairs(source: Any) -> list[tuple[Any, Any]]:
    if isinstance(source, Mapping):
        return list(source.items())
    # A tuple of two adapters is a sequence of them; a tuple whose second part is a weight is a pair.
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], Real | Mapping | Strength):
        return [source]
    if isinstance(source, str):
        _refuse_weight_of_shell(source)
    if isinstance(source, str | PathLike | Adapter) or not isinstance(source, Iterable):
        return [(source, 1.0)]
    return [pair for part in source for pair in _as_pairs(part)]


def _refuse_weight_of_shell(source: str) -> None:
    """Refuse ``"adapter:0.7"`` if there is an ``adapter``, and say how Python writes it."""
    path, _, number = source.rpartition(":")
    # A path may hold a colon itself, so only one that does not exist is taken for a path with a weight.
    if not path or Path(source).exists() or not Path(path).exists():
        return
    with suppress(ValueError):
        weight = float(number)
        raise OptionError(
            f"{source} has a weight behind a colon, which only the command line reads",
            fix=f"give ({path!r}, {weight:g})",
        )


def _as_strength(weight: Any) -> Strength:
    """A weight in its general form, with all its numbers checked."""
    if isinstance(weight, Strength):
        return _check_strength(weight.weight, weight.modules)
    # A mapping alone leaves the weight of other modules at 1, as in a recipe.
    return _check_strength(1.0, weight) if isinstance(weight, Mapping) else _check_strength(weight, {})


def _check_strength(weight: Any, modules: Mapping[str, Any]) -> Strength:
    return Strength(_finite(weight), {glob: _finite(number) for glob, number in modules.items()})


def _finite(weight: Any) -> float:
    if not isinstance(weight, Real) or not isfinite(weight):
        raise OptionError(f"a weight cannot be {weight!r}", fix="give a finite number")
    return float(weight)
