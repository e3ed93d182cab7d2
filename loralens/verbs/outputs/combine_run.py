"""Follows a recipe: it reads, combines, truncates and writes adapters, for the six verbs that combine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast

import numpy as np

from loralens.arithmetic.combine import Combination, combine_adapters
from loralens.arithmetic.method import find_combining_method
from loralens.arithmetic.methods import METHODS
from loralens.choices import TARGET_FORMATS, FloatType, Space, TargetFormat
from loralens.compression.directions import Directions, cast_factors, singular_directions, truncate_pair
from loralens.core.adapter import Adapter
from loralens.core.carried import magnitudes
from loralens.core.messages import note, tell_findings
from loralens.core.naming.base_model import family_contradiction
from loralens.core.naming.selection import select
from loralens.core.progress import progress
from loralens.core.ranks import Rule, RuleName
from loralens.core.recipe import Recipe, Strength
from loralens.core.structured import Update
from loralens.core.threads import Step, processor_count
from loralens.core.together import match_modules, match_names, pad_rank
from loralens.core.vector import with_modules
from loralens.errors import LoraLensError, MismatchError, OptionError, place
from loralens.formats.dialects.sizes import stored_size
from loralens.formats.files.container import Files, Stored
from loralens.formats.records.recipes import stamp_recipe
from loralens.verbs.inputs.adapters import DORA, AdapterSource, Reading, check_unread, read_where_unknown, sources
from loralens.verbs.inputs.bases import base_weights, warn_of_base, warn_of_bases
from loralens.verbs.inputs.choices import numpy_dtype
from loralens.verbs.inputs.weighted import ingredients, label_of_taken, name_damaged
from loralens.verbs.outputs.combine_result import CombineResult
from loralens.verbs.outputs.form import OutputFormat, check_known
from loralens.verbs.outputs.rounding import RoundingCost
from loralens.verbs.outputs.rules import rank_notes
from loralens.verbs.outputs.target import Target
from loralens.verbs.outputs.writing import WritingAndReading, check_writing

if TYPE_CHECKING:
    from loralens.core.weights import Weight

BasePath = str | PathLike[str]


def combine_sources(
    pairs: Sequence[tuple[AdapterSource, Strength]],
    *,
    take: AdapterSource | None = None,
    drop_dead: bool = False,
    force: bool = False,
    **options: Unpack[WritingAndReading],
) -> CombineResult:
    """The exact sum of adapters, each with its own strength: ΔW = Σ w·ΔW."""
    originals = sources([[source for source, _ in pairs]])
    recipe = Recipe(ingredients(pairs), take=label_of_taken(take, pairs), drop_dead=drop_dead)
    return follow_recipe(recipe, originals, force=force, **options)


def follow_recipe(
    recipe: Recipe,
    originals: Sequence[AdapterSource],
    *,
    force: bool = False,
    output: str | PathLike[str] | None = None,
    to: TargetFormat | None = None,
    base: BasePath | None = None,
    dtype: FloatType | None = None,
    allow_loss: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    **reading: Unpack[Reading],
) -> CombineResult:
    """Combine adapters according to a recipe, and write the result if there is an ``output``.

    Parameters
    ----------
    recipe : Recipe
    originals : sequence of path or Adapter
        The adapters of the recipe, in its order.
    force : bool
        Combine adapters of different image models too.
    output, to, base, dtype, allow_loss, overwrite, dry_run
        The options of `Writing`.
    **reading : Reading
        How files are read. ``alpha`` and ``scale`` are used only for files that do not state their scale.
    """
    # Everything that needs no file is checked before any file is read.
    check_writing(to, dtype)
    method = find_combining_method(recipe.method, METHODS)
    method.settings(recipe.options, cast("Space | None", recipe.space))
    target = Target.of(output, overwrite=overwrite, dry_run=dry_run)
    paths = [ingredient.path for ingredient in recipe.adapters]
    if all(isinstance(source, Adapter) for source in originals):
        check_unread(reading)
    adapters = [read_source(source, path, reading, base) for source, path in zip(originals, paths, strict=True)]
    # A single adapter may have an unknown scale, because scaling and negating are relative. A sum of several needs the
    # scale of each, and for q and k in GGUF files the number of heads, which says how their rows are ordered.
    if len(adapters) > 1:
        if not force and (families := family_contradiction(paths, adapters)):
            raise MismatchError(families, fix="give adapters of one model, or --force to combine what they share")
        warn_of_bases(paths, adapters)
        for path, adapter in zip(paths, adapters, strict=True):
            with place(path):
                check_known(adapter, "a sum")
    # The result has the names and the layout of the first adapter, and so also its dialect.
    form = form_of(adapters[0], target, to=to, base=base)
    for source in originals:
        form.check_target(target, source)
    weights = _base_weights(recipe, adapters, base)
    modules = select(match_names(adapters, paths), recipe.modules)
    # A method with one threshold for the whole model, such as ties, looks at all modules before it changes one.
    passes = 2 if method.looks else 1
    damage = name_damaged(list(zip(paths, adapters, strict=True)))
    with progress(recipe.method, passes * len(modules)) as step, damage:
        factors = _combine(recipe, adapters, form, dtype, weights, step)
    adapter, rounding = factors.adapter, _rounding_cost(factors, dtype, allow_loss=allow_loss)
    for text in (*factors.combination.notes, *rank_notes(recipe.truncate.get("rank"), factors.ranks)):
        note(text)
    rows, combination = match_modules(adapters, paths), factors.combination
    nominal_ranks = {name: [module.rank if module else 0 for module in rows[name]] for name in combination.modules}
    size = _write(adapter, recipe, form, target)
    # A method may have chosen a default space. The recipe of the result names this space. The recipe that was written
    # to the file names a space only if the user did.
    followed = replace(recipe, space=combination.recipe.space)
    return CombineResult(
        followed, combination, factors.ranks, nominal_ranks, adapter, form.name, size, rounding, target
    )


def form_of(adapter: Adapter, target: Target, *, to: TargetFormat | None, base: BasePath | None) -> OutputFormat:
    """The dialect of the result: the one asked for, or the first adapter's own.

    Some dialects can be read and not written. If no file is wanted, PEFT takes the place of such a dialect, and there
    is no error.
    """
    if to is None and not target.is_wanted and adapter.format not in TARGET_FORMATS:
        return OutputFormat("peft", {}, base)
    return OutputFormat.of(adapter, to=to, base=base)


def _write(adapter: Adapter, recipe: Recipe, form: OutputFormat, target: Target) -> int | None:
    """Write the result, and return the size of its file of weights in bytes.

    The size is None if no file is wanted and the dialect could not hold the result.
    """
    try:
        stored, files = _encode_with_recipe(adapter, recipe, form)
    except LoraLensError:
        # A result that stays in memory need not fit into any dialect.
        if not target.is_wanted:
            return None
        raise
    target.write(stored, files)
    return stored_size(stored, files)


def read_source(source: AdapterSource, label: str, reading: Reading, base: BasePath | None) -> Adapter:
    """Read an adapter that is to be combined, and tell the user what was noticed.

    ``alpha`` and ``scale`` are used only if the file does not state its scale, since they are given once for all files.
    """
    adapter = read_where_unknown(source, reading, base=base)
    if base is not None:
        warn_of_base(label, adapter, base)
    if not isinstance(source, Adapter):
        # The finding says that magnitudes are not measured. With a base they are combined exactly.
        tell_findings(label, adapter.findings, without={DORA} if base else ())
    return adapter


def _base_weights(recipe: Recipe, adapters: Sequence[Adapter], base: BasePath | None) -> "Mapping[str, Weight] | None":
    """The weights of the base, if DoRA's magnitudes need them; otherwise None.

    Raises
    ------
    MismatchError
        The factors of a DoRA adapter are to change, and no base was given.
    """
    dora = [
        ingredient.path for ingredient, adapter in zip(recipe.adapters, adapters, strict=True) if magnitudes(adapter)
    ]
    # The sum of one adapter at weight 1 is that adapter, whose magnitudes stay as they are.
    alone = len(adapters) == 1 and recipe.adapters[0].strength.plain and not recipe.options
    if not dora or (alone and not recipe.truncate):
        return None
    if base is None:
        if alone:
            raise MismatchError(
                f"{dora[0]} is a DoRA adapter: its magnitudes are right only for its unchanged factors",
                fix="give --base, or cut it with loralens compress",
            )
        # combine_adapters refuses several DoRA adapters without a base.
        return None
    weights = [base_weights(base, adapter.modules).modules for adapter in adapters]
    # Reversed, so that the first adapter wins where two have a module: the result has its names and layout.
    return {name: weight for each in reversed(weights) for name, weight in each.items()}


@dataclass(frozen=True, slots=True)
class _Factors:
    """The combined adapter in the dtype that is written, and its new factors before they were rounded.

    Attributes
    ----------
    ranks : mapping of str to int
        The ranks to which modules were truncated; empty without a rule.
    exact : mapping of str to Update
        The modules with new factors in float64, at the same ranks.
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
    weights: "Mapping[str, Weight] | None",
    step: Step | None,
) -> _Factors:
    """Combine the adapters, and truncate or pad the result if the recipe says so."""
    chosen = numpy_dtype(dtype)
    combination = combine_adapters(
        [(adapter, ingredient.strength) for adapter, ingredient in zip(adapters, recipe.adapters, strict=True)],
        method=recipe.method,
        seed=recipe.seed,
        space=cast("Space | None", recipe.space),
        modules=recipe.modules,
        take=_place_of_taken(recipe),
        # Factors that are truncated afterwards are rounded only then, and so only once.
        dtype=None if recipe.truncate else chosen,
        drop_dead=recipe.drop_dead,
        # An elementwise result in the space ``full`` has full rank. It is cut to the sum of the ranks, or to ``width``
        # if that is larger.
        width=int(recipe.truncate.get("rank", 0)),
        labels=[ingredient.path for ingredient in recipe.adapters],
        weights=weights,
        threads=processor_count(),
        step=step,
        **recipe.options,
    )
    if recipe.truncate:
        common = chosen or _common_dtype(adapters)
        ranks, at = _truncate(combination, recipe, form, common)
        adapter = combination.with_magnitudes(with_modules(combination.adapter, at(common)))
        return _Factors(combination, ranks, adapter, at(np.dtype(np.float64)))
    adapter = combination.adapter
    # Modules without a lift kept their stored factors, which nothing has rounded.
    exact = {name: lift.at(dtype=np.float64) for name, lift in combination.lifts.items() if name in adapter}
    # Without a rule nothing is cut, so all modules become as wide as the widest.
    if recipe.uniform:
        rank = max(module.rank for module in adapter.modules.values())
        adapter = adapter.map(lambda module: pad_rank(module, rank))
    return _Factors(combination, {}, adapter, exact)


def _truncate(
    combination: Combination, recipe: Recipe, form: OutputFormat, dtype: np.dtype[Any]
) -> tuple[dict[str, int], Callable[[np.dtype[Any]], Mapping[str, Update]]]:
    """Choose the ranks as `compress` does, and return a function that makes the modules of these ranks in any dtype.

    The dtype that is given here only counts for the size of the file.
    """
    from loralens.compression.plan import TruncationPlan, keeps_rank  # most sums keep all ranks

    def directions_of(name: str, module: Any) -> Directions:
        if name not in combination.lifts:
            return singular_directions(module)
        # New factors are singular vectors already, so the matrices that select directions are identities.
        s = combination.lifts[name].s
        return Directions(s, np.eye(module.rank, s.size), np.eye(s.size, module.rank))

    def size(adapter: Adapter) -> int:
        # With the recipe, which is a part of the file and counts against a budget of bytes.
        return stored_size(*_encode_with_recipe(adapter, recipe, form))

    own = {name: directions_of(name, module) for name, module in combination.adapter.items() if not keeps_rank(module)}
    # A recipe has at most one rule, as the options have.
    ((rule, value),) = recipe.truncate.items()
    ranks = TruncationPlan(combination.adapter, own, dtype).ranks(
        Rule(cast("RuleName", rule), value), one_rank=recipe.uniform, drop_dead=recipe.drop_dead, size=size
    )

    def truncated_module(name: str, module: Any, dtype: np.dtype[Any]) -> Update:
        rank = ranks.get(name, module.rank)
        # A lift computes its factors from float64 for any rank, so they are rounded once.
        if name in combination.lifts:
            return combination.lifts[name].at(rank, dtype)
        return cast_factors(module, dtype) if rank == module.rank else truncate_pair(module, own[name], rank, dtype)

    def at(dtype: np.dtype[Any]) -> Mapping[str, Update]:
        return {
            name: truncated_module(name, module, dtype)
            for name, module in combination.adapter.items()
            # With rank 0, --drop-dead leaves a module out. A grouped convolution has no entry, and keeps its rank.
            if ranks.get(name, 1)
        }

    return ranks, at


def _rounding_cost(factors: _Factors, dtype: FloatType | None, *, allow_loss: bool) -> RoundingCost | None:
    """The error that rounding adds to the new factors.

    It is None if it was not measured, because measuring costs a pass over all modules. It is measured if the user asked
    for a dtype, and for float16, in which small numbers lose digits or become 0. The error of the other dtypes follows
    from their digits.
    """
    adapter = factors.adapter
    if not (dtype or any(module.dtype == np.float16 for module in adapter.modules.values())):
        return None
    before = replace(adapter, modules={**adapter.modules, **factors.exact})
    return RoundingCost.between(before, adapter.modules, allow_loss=allow_loss, dtype=dtype)


def _common_dtype(adapters: Sequence[Adapter]) -> np.dtype[Any]:
    """The dtype that all factors share, or float32 if they have several."""
    # float32 holds every number of float16, bfloat16 and float8.
    dtypes = {module.dtype for adapter in adapters for module in adapter.modules.values()}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def _place_of_taken(recipe: Recipe) -> int | Literal["none"] | None:
    """The index of the adapter whose full tensors are used; ``none`` and None are passed on.

    Raises
    ------
    OptionError
        No adapter of the recipe has this path, name or number.
    """
    if recipe.take in (None, "none"):
        return cast("Literal['none'] | None", recipe.take)
    paths = [ingredient.path for ingredient in recipe.adapters]
    for t, path in enumerate(paths):
        if recipe.take in (path, Path(path).name, str(t + 1)):
            return t
    raise OptionError(f"--take {recipe.take}: no such adapter here", fix=f"give {', '.join(paths)}, or none")


def _encode_with_recipe(adapter: Adapter, recipe: Recipe, form: OutputFormat) -> tuple[Stored, Files]:
    """The content of the file: the adapter, with the recipe in the metadata."""
    stored, files = form.encode(adapter)
    # read_recipe looks for it in safetensors files alone.
    return (stamp_recipe(stored, recipe) if files.weights.endswith(".safetensors") else stored), files
