"""Follows a recipe: reads, combines, truncates and writes adapters; shared by the six verbs of combining."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, cpu_count
from pathlib import Path
from typing import Any, Literal, Unpack, cast

import numpy as np

from loralens.arithmetic.combine import Combination, combine_adapters
from loralens.arithmetic.method import Space, find_combining_method
from loralens.arithmetic.methods import METHODS
from loralens.compression.directions import Directions, cast_factors, singular_directions, truncate_pair
from loralens.compression.plan import TruncationPlan, keeps_rank
from loralens.core.adapter import Adapter
from loralens.core.carried import magnitudes
from loralens.core.messages import note, tell_findings
from loralens.core.names import select
from loralens.core.progress import progress
from loralens.core.ranks import Rule, RuleName
from loralens.core.recipe import Recipe, Strength
from loralens.core.structured import Update
from loralens.core.threads import Step
from loralens.core.together import match_modules, match_names, pad_rank
from loralens.core.vector import with_modules
from loralens.core.weights import Weight
from loralens.errors import LoraLensError, MismatchError, OptionError, place
from loralens.formats import encode_adapter
from loralens.formats.dialects.sizes import stored_size
from loralens.formats.files.container import Files, Stored
from loralens.formats.records.recipes import stamp_recipe
from loralens.verbs.inputs.adapters import DORA, AdapterSource, Reading, check_unread, read_where_unknown, sources
from loralens.verbs.inputs.bases import base_weights, warn_of_base, warn_of_bases
from loralens.verbs.inputs.choices import (
    FLOAT_TYPES,
    TARGET_FORMATS,
    FloatType,
    TargetFormat,
    check_choice,
    numpy_dtype,
)
from loralens.verbs.inputs.weighted import ingredients, label_of_taken
from loralens.verbs.outputs.combine_result import CombineResult
from loralens.verbs.outputs.form import OutputFormat, check_known
from loralens.verbs.outputs.rounding import RoundingCost, quantise_factors
from loralens.verbs.outputs.rules import rank_notes
from loralens.verbs.outputs.target import Target
from loralens.verbs.outputs.writing import WritingAndReading

BasePath = str | PathLike[str]


def combine_sources(
    pairs: Sequence[tuple[AdapterSource, Strength]],
    *,
    take: AdapterSource | None = None,
    drop_dead: bool = False,
    **options: Unpack[WritingAndReading],
) -> CombineResult:
    """The exact sum of adapters, each at its own strength."""
    checked = sources([[source for source, _ in pairs]])
    recipe = Recipe(ingredients(pairs), take=label_of_taken(take, pairs), drop_dead=drop_dead)
    return follow(recipe, checked, **options)


def follow(
    recipe: Recipe,
    originals: Sequence[AdapterSource],
    *,
    output: str | PathLike[str] | None = None,
    to: TargetFormat | None = None,
    base: BasePath | None = None,
    dtype: FloatType | None = None,
    allow_loss: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    **reading: Unpack[Reading],
) -> CombineResult:
    """Combine adapters as the recipe says, and write the result where there is an ``output``.

    ``originals`` are the adapters of the recipe, one by one: paths, or adapters that have been read.
    """
    check_writing(to, dtype)
    method = find_combining_method(recipe.method, METHODS)
    method.settings(recipe.options, cast("Space | None", recipe.space))  # refused before anything is read
    target = Target.of(output, overwrite=overwrite, dry_run=dry_run)
    paths = [ingredient.path for ingredient in recipe.adapters]
    if all(isinstance(source, Adapter) for source in originals):
        check_unread(reading)
    adapters = [read_source(source, path, reading, base) for source, path in zip(originals, paths, strict=True)]
    if len(adapters) > 1:
        warn_of_bases(paths, adapters)
        for path, adapter in zip(paths, adapters, strict=True):
            with place(path):
                check_known(adapter, "a sum")  # neither a strength nor an order of rows that is not known adds up
    form = form_of(adapters[0], target, to=to, base=base)
    for source in originals:
        form.check_target(target, source)
    weights = _base_weights(recipe, adapters, base)
    modules = select(match_names(adapters, paths), recipe.modules)
    passes = 2 if method.looks else 1  # over all modules
    with progress(recipe.method, passes * len(modules)) as step:
        factors = _combine(recipe, adapters, form, dtype, weights, step)
    adapter, rounding = _round(factors, form, dtype, allow_loss=allow_loss)
    for text in (*factors.combination.notes, *rank_notes(recipe.truncate.get("rank"), factors.ranks)):
        note(text)
    rows = match_modules(adapters, paths)
    return CombineResult(
        replace(recipe, space=factors.combination.recipe.space),
        factors.combination,
        factors.ranks,
        {name: [module.rank if module else 0 for module in rows[name]] for name in factors.combination.modules},
        adapter,
        form.name,
        _write(adapter, recipe, form, target),
        rounding,
        target,
    )


def form_of(adapter: Adapter, target: Target, *, to: TargetFormat | None, base: BasePath | None) -> OutputFormat:
    """The dialect of the result; that of PEFT where its own is only read, and nothing is to be written."""
    if to is None and _without_file(target) and adapter.format not in TARGET_FORMATS:
        return OutputFormat("peft", {}, base)
    return OutputFormat.of(adapter, to=to, base=base)


def _without_file(target: Target) -> bool:
    """Whether nothing is to be written, nor checked for being written: Python takes the adapter that is returned."""
    return target.output is None and not target.dry_run


def _write(adapter: Adapter, recipe: Recipe, form: OutputFormat, target: Target) -> int | None:
    """Write the result where it is to be written; bytes of its file of weights.

    None where nothing is to be written and the dialect could not hold it.
    """
    try:
        stored, files = _as_stored(adapter, recipe, form)
    except LoraLensError:
        if _without_file(target):
            return None
        raise
    target.write(stored, files)
    return stored_size(stored, files)


def check_writing(to: str | None, dtype: str | None) -> None:
    """Refuse a dialect or a dtype that is none, before anything is read."""
    check_choice("to", to, TARGET_FORMATS)
    check_choice("dtype", dtype, FLOAT_TYPES)


def read_source(source: AdapterSource, label: str, reading: Reading, base: BasePath | None) -> Adapter:
    """An adapter to be combined; ``alpha`` and ``scale`` count where its file does not say its own."""
    adapter = read_where_unknown(source, reading, base=base)
    if base is not None:
        warn_of_base(label, adapter, base)
    if not isinstance(source, Adapter):
        tell_findings(label, adapter.findings, without={DORA} if base else ())  # with a base, DoRA is combined whole
    return adapter


def _base_weights(recipe: Recipe, adapters: Sequence[Adapter], base: BasePath | None) -> Mapping[str, Weight] | None:
    """The base weights, where DoRA's magnitudes need them; None where nothing does.

    Raises
    ------
    MismatchError
        The factors of a DoRA adapter are to be cut, and the base is not there.
    """
    dora = [
        ingredient.path for ingredient, adapter in zip(recipe.adapters, adapters, strict=True) if magnitudes(adapter)
    ]
    alone = len(adapters) == 1 and recipe.adapters[0].strength.plain and not recipe.options
    if not dora or (alone and not recipe.truncate):
        return None
    if base is None:
        if alone:
            raise MismatchError(
                f"{dora[0]} is a DoRA adapter: its magnitudes belong to its factors as they are",
                fix="give --base, or cut it with loralens compress",
            )
        return None
    weights = [base_weights(base, adapter.modules).modules for adapter in adapters]
    return {name: weight for each in reversed(weights) for name, weight in each.items()}


@dataclass(frozen=True, slots=True)
class _Factors:
    """New factors, in the dtype that is written and before they were rounded.

    Attributes
    ----------
    ranks : mapping of str to int
        What its modules are cut to; empty where they are not.
    exact : mapping of str to Update
        New modules in float64, at the same ranks.
    """

    combination: Combination
    ranks: Mapping[str, int]
    adapter: Adapter
    exact: Mapping[str, Update]


def _combine(
    recipe: Recipe,
    adapters: Sequence[Adapter],
    form: OutputFormat,
    dtype: FloatType | None,
    weights: Mapping[str, Weight] | None,
    step: Step | None,
) -> _Factors:
    chosen = numpy_dtype(dtype)
    combination = combine_adapters(
        [(adapter, ingredient.strength) for adapter, ingredient in zip(adapters, recipe.adapters, strict=True)],
        method=recipe.method,
        seed=recipe.seed,
        space=cast("Space | None", recipe.space),
        modules=recipe.modules,
        take=_place_of_taken(recipe),
        dtype=None if recipe.truncate else chosen,  # what is cut is rounded once, afterwards
        drop_dead=recipe.drop_dead,
        width=int(recipe.truncate.get("rank", 0)),
        labels=[ingredient.path for ingredient in recipe.adapters],
        weights=weights,
        threads=cpu_count() or 1,
        step=step,
        **recipe.options,
    )
    if recipe.truncate:
        common = chosen or _common_dtype(adapters)
        ranks, at = _truncate(combination, recipe, form, common)
        adapter = combination.with_magnitudes(with_modules(combination.adapter, at(common)))
        return _Factors(combination, ranks, adapter, at(np.dtype(np.float64)))
    adapter = combination.adapter
    exact = {name: lift.at(dtype=np.float64) for name, lift in combination.lifts.items() if name in adapter}
    if recipe.uniform:  # all modules as wide as the widest, by zeros
        rank = max(module.rank for module in adapter.modules.values())
        adapter = adapter.map(lambda module: pad_rank(module, rank))
    return _Factors(combination, {}, adapter, exact)


def _truncate(
    combination: Combination, recipe: Recipe, form: OutputFormat, dtype: np.dtype[Any]
) -> tuple[dict[str, int], Callable[[np.dtype[Any]], Mapping[str, Update]]]:
    """The ranks that the rule gives, as `compress` chooses them, and the modules at these ranks, in any dtype."""

    def directions_of(name: str, module: Any) -> Directions:
        if name not in combination.lifts:
            return singular_directions(module)
        s = combination.lifts[name].s  # new factors are singular vectors already
        return Directions(s, np.eye(module.rank, s.size), np.eye(s.size, module.rank))

    def size(adapter: Adapter) -> int:
        return stored_size(*_as_stored(adapter, recipe, form))

    own = {name: directions_of(name, module) for name, module in combination.adapter.items() if not keeps_rank(module)}
    ((rule, value),) = recipe.truncate.items()
    ranks = TruncationPlan(combination.adapter, own, dtype).ranks(
        Rule(cast("RuleName", rule), value), one_rank=recipe.uniform, drop_dead=recipe.drop_dead, size=size
    )

    def truncated_module(name: str, module: Any, dtype: np.dtype[Any]) -> Update:
        rank = ranks.get(name, module.rank)
        if name in combination.lifts:
            return combination.lifts[name].at(rank, dtype)
        return (
            cast_factors(module, dtype) if rank == module.rank else truncate_pair(module, own[name].head(rank), dtype)
        )

    def at(dtype: np.dtype[Any]) -> Mapping[str, Update]:
        return {
            name: truncated_module(name, module, dtype)
            for name, module in combination.adapter.items()
            if ranks.get(name, 1)
        }

    return ranks, at


def _round(
    factors: _Factors, form: OutputFormat, dtype: FloatType | None, *, allow_loss: bool
) -> tuple[Adapter, RoundingCost | None]:
    """The adapter, in few bits where the dialect has them, and what rounding costs its new factors.

    None where nobody asked for a dtype or few bits, and float16 is not among the dtypes: the error of the others
    follows from their digits, and float16 also has numbers that are too small for it.
    """
    adapter = factors.adapter
    narrow = dtype or form.bits or any(module.dtype == np.float16 for module in adapter.modules.values())
    if not narrow:
        return adapter, None
    before = replace(adapter, modules={**adapter.modules, **factors.exact})
    after = quantise_factors(adapter, form.bits) if form.bits else adapter
    allowed = allow_loss or form.bits is not None
    return after, RoundingCost.between(before, after.modules, allow_loss=allowed, dtype=dtype)


def _common_dtype(adapters: Sequence[Adapter]) -> np.dtype[Any]:
    """The dtype of all factors where they have one, else float32."""
    dtypes = {module.dtype for adapter in adapters for module in adapter.modules.values()}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def _place_of_taken(recipe: Recipe) -> int | Literal["none"] | None:
    """The place of the adapter whose full tensors stand."""
    if recipe.take in (None, "none"):
        return cast("Literal['none'] | None", recipe.take)
    paths = [ingredient.path for ingredient in recipe.adapters]
    for t, path in enumerate(paths):
        if recipe.take in (path, Path(path).name, str(t + 1)):
            return t
    raise OptionError(f"--take {recipe.take}: no such adapter here", fix=f"give {', '.join(paths)}, or none")


def _as_stored(adapter: Adapter, recipe: Recipe, form: OutputFormat) -> tuple[Stored, Files]:
    """What is written: the adapter, with the recipe in the metadata where there is any."""
    stored, files = encode_adapter(adapter, form.name, **form.writer_options)
    return (stamp_recipe(stored, recipe) if files.weights.endswith(".safetensors") else stored), files
