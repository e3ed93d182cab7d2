"""The verb ``combine``: makes one adapter from several, by the exact sum or by a method of the literature."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from loralens.arithmetic.combine import Combination, combine_adapters
from loralens.arithmetic.methods import METHODS, SPACES, find_combining_method
from loralens.arithmetic.quality import AdapterShare, CombinationQuality
from loralens.choices import FloatType, Space
from loralens.compression.directions import Directions, cast_factors, singular_directions, truncate_pair
from loralens.core.adapter import Adapter
from loralens.core.base_model import family_contradiction
from loralens.core.messages import note, progress, tell_findings, warn
from loralens.core.model_in_memory import ModelPath
from loralens.core.ranks import Rule
from loralens.core.selection import glob_in_words, select
from loralens.core.stored import Ingredient, Recipe, Strength
from loralens.core.structured import Update, factor_dtypes
from loralens.core.threads import Step, processor_count
from loralens.core.together import magnitudes, match_modules, match_names, pad_rank, with_modules
from loralens.errors import LoraLensError, MismatchError, OptionError, place
from loralens.exports import takes_options
from loralens.formats import stored_size
from loralens.formats.files.container import Files, Stored
from loralens.formats.records.results import read_recipe, stamp_recipe
from loralens.formats.records.training_notes import join_notes
from loralens.tables.numbers import MINUS, count, fixed, join_words, number, percent, shape, size
from loralens.tables.table import ALWAYS, Column, Columns, Keys, Table, label_column, rows_key
from loralens.verbs.files.output import (
    OutputFormat,
    RoundingCost,
    Target,
    Writing,
    Written,
    check_known,
    round_factors,
)
from loralens.verbs.shared.adapters import (
    DORA,
    AdapterSource,
    Source,
    WithStrength,
    base_weights,
    check_unread,
    find_source,
    ingredients,
    label_of_taken,
    name_damaged,
    read_where_unknown,
    sources,
    sources_with_strengths,
    warn_of_base,
    warn_of_bases,
)
from loralens.verbs.shared.options import (
    BlockWeights,
    ModuleChoice,
    RankRules,
    Reading,
    check_choice,
    check_finite,
    numpy_dtype,
    option_names,
    rank_notes,
    weights_by_module,
)

if TYPE_CHECKING:
    from loralens.core.weights import Weight


# A relative error below this is rounding of float64 (2e-16 for each operation), and is shown as 0.
EXACT = 1e-12


NAMED = 3  # most adapters, or weights of one adapter, that a sentence lists


@dataclass(frozen=True, slots=True)
class CombinedModule:
    """One row: a module of the result R.

    Attributes
    ----------
    shape : list of int or None
        (out, in); None if the module was left out because its result is 0.
    ranks_before : list of int
        The nominal rank in every adapter; 0 if the adapter lacks the module.
    rank : int
        The rank that is written; 0 if the module was left out.
    truncation : float
        ‖F−R‖_F/‖F‖_F, the share of the method's own result F that does not fit into the rank.
    error_to_sum : float or None
        ‖R−Σw·ΔW‖_F/‖Σw·ΔW‖_F, before the factors are rounded; None if the sum is 0 and R is not.
    """

    name: str
    shape: list[int] | None
    ranks_before: list[int]
    rank: int
    truncation: float
    error_to_sum: float | None


@dataclass(frozen=True, slots=True)
class CombinedAdapter:
    """One row: an adapter, and its share in the result."""

    ingredient: Ingredient
    share: AdapterShare


@dataclass(frozen=True, slots=True, repr=False)
class CombineResult(Written):
    """Several adapters that were combined into one.

    Attributes
    ----------
    recipe : Recipe
        The adapters, weights and options, with the space in which an elementwise method acted. ``combine(recipe=…)``
        follows it again.
    combination : Combination
        The result before it was truncated and rounded, with the quality of every module.
    ranks : mapping of str to int
        The ranks to which modules were truncated; empty without a rule.
    nominal_ranks : mapping of str to list of int
        The rank of each module in every adapter; 0 if the adapter lacks the module.
    adapter : Adapter
        The result as it is written.
    format : str
        The dialect of the result.
    size : int or None
        The size of its file of weights in bytes; None if no file is wanted and the dialect could not hold it.
    rounding : RoundingCost or None
        The error that rounding the factors adds; None if it was not measured.
    total : CombinationQuality
        The errors over all modules, and the share of each adapter in the result.
    """

    recipe: Recipe
    combination: Combination
    ranks: Mapping[str, int]
    nominal_ranks: Mapping[str, list[int]]
    adapter: Adapter
    format: str
    size: int | None
    rounding: RoundingCost | None
    total: CombinationQuality
    target: Target

    @property
    def modules(self) -> list[CombinedModule]:
        """All modules, also those that were left out because their result is 0."""
        return [
            CombinedModule(
                name,
                list(self.adapter[name].shape) if name in self.adapter else None,
                self.nominal_ranks[name],
                self.adapter[name].rank if name in self.adapter else 0,
                self.combination.truncated(name, self.ranks.get(name)),
                # At the rank of truncation; None is the rank that the method gave.
                quality.error_to_sum(self.ranks.get(name)),
            )
            for name, quality in self.combination.modules.items()
        ]

    @property
    def adapters(self) -> list[CombinedAdapter]:
        """Every adapter, and its share in the result."""
        return [
            CombinedAdapter(ingredient, share)
            for ingredient, share in zip(self.recipe.adapters, self.total.shares, strict=True)
        ]

    def tables(self) -> list[Table[Any]]:
        """The modules, then the adapters."""
        # An exact multiple of one adapter shares nothing with others, and loses nothing.
        alone = len(self.recipe.adapters) == 1 and self._exact
        return [self._modules_table(), *([] if alone else [self._adapters_table()])]

    @property
    def _exact(self) -> bool:
        """Whether the result is the exact sum, before its factors are rounded."""
        error = self.total.error_to_sum
        return error is not None and error < EXACT

    def conclusion(self) -> list[str]:
        """What was combined and how far the result is from the exact sum; then how much of each adapter it contains."""
        recipe, total = self.recipe, self.total
        written = f"{count(len(self.adapter), 'module')}, {self.format}"
        if self.size is not None:
            written += f", {size(self.size)}"
        parts = [_ingredient_text(each) for each in recipe.adapters]
        plain = recipe.method == "sum" and not recipe.options
        # A minus sign in place of "+ -".
        origin = (
            " + ".join(parts).replace(f"+ {MINUS}", f"{MINUS} ") if plain else f"{recipe.method} of {join_words(parts)}"
        )
        error = "exact" if self._exact else f"{_error(total.error_to_sum)} off the exact sum"
        sentences = [self.target.conclusion(f"{origin}, {error} ({written})")]
        # An exact sum retains everything, and a list of many is too long for a sentence.
        shares = [row for row in self.adapters if row.share.retained is not None]
        if not self._exact and len(shares) <= NAMED:
            retained = [f"{percent(row.share.retained)} of {row.ingredient.path}" for row in shares]
            sentences.append(f"Its directions hold {join_words(retained)}.")
        return sentences

    def sentences(self) -> list[str]:
        """The errors over all modules, and the exact sizes."""
        total = self.total
        lines = []
        if not self._exact:
            error = _error(total.error_to_sum)
            lines.append(f"error       ‖R−Σw·ΔW‖/‖Σw·ΔW‖ = {error} over all modules, before the factors are rounded")
        # Sums and methods whose result fits into the rank cut off nothing, and need no line.
        if total.truncation >= EXACT:
            lost = _error(total.truncation)
            lines.append(
                f"truncation  ‖F−R‖/‖F‖ = {lost} over all modules: "
                "the part of the method's own result F that was cut off"
            )
        if self.rounding and self.rounding.worst:
            lines.append(str(self.rounding))
        lines.append(f"parameters  {self.adapter.parameters:,}")
        if self.size is not None:
            lines.append(f"bytes       {self.size:,}")
        return lines

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            Column("target", "target.written"),
            "format",
            Column("method", "recipe.method"),
            # Methods that commute with rotations have no space of their own; they work on the small cores.
            Column("space", lambda result: result.recipe.space or "core", type=str),
            rows_key("adapters", (*ADAPTER_COLUMNS[:1], *WEIGHTS, *ADAPTER_COLUMNS[1:])),
            rows_key("modules", MODULE_COLUMNS),
            *(Column(("total", key), f"total.{key}") for key in ("error_to_sum", "truncation")),
            Column(("total", "rounding"), "rounding"),
            Column(("total", "modules"), "adapter.len", type=int),
            Column(("total", "parameters"), "adapter.parameters"),
            Column(("total", "bytes"), "size"),
            Column("recipe", _recipe_record, type=dict[str, Any]),
            Column("notes", "combination.notes"),
        )

    def _modules_table(self) -> Table[CombinedModule]:
        truncated = self.total.truncation >= EXACT  # as in `sentences`
        space = f", in the {self.recipe.space} space" if self.recipe.space else ""
        errors = "truncation, error to the exact sum" if truncated else "error to the exact sum"
        rows = self.modules
        # A column without a title is shown to machines only. A column of zeros would tell people nothing.
        title = f"{self.recipe.method}{space}: {count(len(rows), 'module')}, r before and r' after, {errors}"
        columns = [
            replace(column, title="") if column.key == "truncation" and not truncated else column
            for column in MODULE_COLUMNS
        ]
        return Table(
            title,
            columns,
            rows,
            uneventful=_is_taken_over,
            sum_up=lambda taken: f"{count(taken, 'module')} taken from one adapter, without an error",
        )

    def _adapters_table(self) -> Table[CombinedAdapter]:
        rows = self.adapters
        strengths = [row.ingredient.strength for row in rows]
        total = number(sum(strength.weight for strength in strengths), 6)
        title = f"{count(len(rows), 'adapter')}, weights add up to {total}"
        # The sum in the title does not hold for a module that has weights of its own.
        if any(strength.modules for strength in strengths):
            title += " (*: others in some modules)"
        return Table(title, ADAPTER_COLUMNS, rows)


def _recipe_record(result: CombineResult) -> dict[str, Any]:
    recipe = result.recipe.record()
    # JSON has no infinity, which only an option may be. The recipe in the metadata of a file keeps it.
    if "options" in recipe:
        recipe["options"] = {name: value if isfinite(value) else None for name, value in recipe["options"].items()}
    return recipe


def _ingredient_text(ingredient: Ingredient) -> str:
    """An adapter in a sentence: ``chat``, ``0.7 × chat``, or ``chat × 0.7 in q_proj``."""
    strength = ingredient.strength
    if not strength.modules:
        factor = {1.0: "", -1.0: MINUS}.get(strength.weight, f"{number(strength.weight, 6)} × ")
        return f"{factor}{ingredient.path}"
    exceptions = [f"{number(weight, 6)} × in {glob_in_words(glob)}" for glob, weight in strength.modules.items()]
    if len(exceptions) > NAMED:
        # Weights of blocks name hundreds of modules. The number of modules that have each weight says more than the
        # first three names.
        modules = Counter(strength.modules.values())
        exceptions = [f"{number(weight, 6)} × in {count(of, 'module')}" for weight, of in sorted(modules.items())]
    listed = ", ".join(exceptions[:NAMED]) + (", …" if len(exceptions) > NAMED else "")
    return f"{ingredient.path} ({listed}, {number(strength.weight, 6)} × elsewhere)"


def _is_taken_over(row: CombinedModule) -> bool:
    """Whether a module comes from one adapter alone, with its rank and without an error."""
    ranks = [rank for rank in row.ranks_before if rank]
    exact = row.truncation < EXACT and row.error_to_sum is not None and row.error_to_sum < EXACT
    return exact and len(ranks) == 1 and row.rank == ranks[0]


def _error(value: float | None) -> str:
    return "sum is 0" if value is None else "0" if value < EXACT else percent(value)


# In column r, "–" means that the adapter lacks the module; in r', "gone" means that the result does. The error and the
# new rank are what methods are compared by, so a narrow terminal keeps these columns.
MODULE_COLUMNS: Columns[CombinedModule] = (
    label_column("name", "module"),
    Column("shape", "shape", "out × in", lambda sizes: shape(sizes or ()), csv=False, priority=4),
    Column("out", lambda row: row.shape and row.shape[0], json=False),
    Column("in", lambda row: row.shape and row.shape[1], json=False),
    Column(
        "ranks_before", "ranks_before", "r", lambda ranks: " + ".join(str(rank or "–") for rank in ranks), priority=5
    ),
    Column("rank", "rank", "r'", lambda rank: str(rank or "gone"), priority=ALWAYS),
    Column("truncation", "truncation", "truncation", _error, priority=6),
    Column("error_to_sum", "error_to_sum", "error", _error, priority=ALWAYS, matters="largest"),
)


# Weights of their own for some modules are rare, and left out where there are none.
WEIGHTS: Columns[CombinedAdapter] = (
    Column("weight", "ingredient.strength.weight"),
    Column("modules", lambda row: dict(row.ingredient.strength.modules) or ..., type=dict[str, float], may_lack=True),
)
# JSON has the weight from the record of the ingredient, with its exceptions by module, which one column cannot state.
ADAPTER_COLUMNS: Columns[CombinedAdapter] = (
    label_column("path", "adapter", "ingredient.path"),
    Column(
        "strength",
        lambda row: number(row.ingredient.strength.weight, 6) + (" *" if row.ingredient.strength.modules else ""),
        "weight",
        json=False,
        csv=False,
        priority=8,
    ),
    Column("retained", "share.retained", "retained", percent, priority=ALWAYS),
    Column("gain", "share.gain", "gain", fixed(".3f"), priority=ALWAYS),
    Column(
        ("interference", "before"),
        "share.interference_before",
        "interference in the sum",
        fixed(".3f"),
        priority=3,
    ),
    Column(
        ("interference", "after"),
        "share.interference_after",
        "in the result",
        fixed(".3f"),
        priority=2,
    ),
)


ALL_BLOCKS = BlockWeights()  # no weights of blocks


def combine_sources(
    pairs: Sequence[tuple[AdapterSource, Strength]],
    *,
    take: AdapterSource | None = None,
    drop_dead: bool = False,
    force: bool = False,
    blocks: BlockWeights = ALL_BLOCKS,
    within: Sequence[str] = (),
    writing: Writing,
    reading: Reading,
) -> CombineResult:
    """The exact sum of adapters, each with its own strength: ΔW = Σ w·ΔW. Options are those of `follow_recipe`."""
    originals = sources([[source for source, _ in pairs]])
    recipe = Recipe(ingredients(pairs), take=label_of_taken(take, pairs), drop_dead=drop_dead)
    return follow_recipe(recipe, originals, force=force, blocks=blocks, within=within, writing=writing, reading=reading)


def follow_recipe(
    recipe: Recipe,
    originals: Sequence[AdapterSource],
    *,
    force: bool = False,
    blocks: BlockWeights = ALL_BLOCKS,
    within: Sequence[str] = (),
    writing: Writing,
    reading: Reading,
) -> CombineResult:
    """Combine adapters according to a recipe, and write the result if there is an ``output``.

    ``originals`` are the adapters of the recipe, in its order. ``alpha`` and ``scale`` are used only for files that do
    not state their scale. The weights of ``blocks`` multiply those of the recipe, in the modules of the globs
    ``within`` alone if there are some.
    """
    base = writing.base
    # Everything that needs no file is checked before any file is read.
    writing.check()
    method = find_combining_method(recipe.method, METHODS)
    method.settings(recipe.options, cast("Space | None", recipe.space))
    _warn_of_zeros(recipe)
    paths = [ingredient.path for ingredient in recipe.adapters]
    if all(isinstance(source, Adapter) for source in originals):
        check_unread(reading)
    originals = [find_source(source)[0] for source in originals]
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
    if blocks:
        recipe = _weigh_blocks(recipe, adapters, blocks, within)
    # The result has the names and the layout of the first adapter, and so also its dialect.
    form = writing.form(adapters[0])
    for source in originals:
        form.check_target(writing, source)
    weights = _base_weights(recipe, adapters, base)
    modules = select(match_names(adapters, paths), recipe.modules)
    # A method with one threshold for the whole model, such as ties, looks at all modules before it changes one.
    passes = 2 if method.looks else 1
    damage = name_damaged(list(zip(paths, adapters, strict=True)))
    with progress(recipe.method, passes * len(modules)) as step, damage:
        combination, ranks, adapter, exact = _combine(recipe, adapters, form, writing.dtype, weights, step)
    adapter = replace(adapter, source=" and ".join(path.removeprefix("in memory: ") for path in paths))
    # Measuring costs a pass over all modules. The error of a dtype that nobody asked for follows from its digits,
    # except in float16, in which small numbers lose digits or become 0.
    rounding = None
    if writing.dtype or any(module.dtype == np.float16 for module in adapter.modules.values()):
        before = replace(adapter, modules={**adapter.modules, **exact})
        rounding = RoundingCost.between(before, adapter.modules, allow_loss=writing.allow_loss, dtype=writing.dtype)
    # An adapter that is not added gives no words.
    added = [
        each.metadata
        for each, ingredient in zip(adapters, recipe.adapters, strict=True)
        if max(ingredient.strength.weight, *ingredient.strength.modules.values(), 0.0) > 0 or each is adapters[0]
    ]
    adapter = replace(adapter, metadata=join_notes(added))
    for text in (*combination.notes, *rank_notes(recipe.truncate, ranks)):
        note(text)
    rows = match_modules(adapters, paths)
    nominal_ranks = {name: [module.rank if module else 0 for module in rows[name]] for name in combination.modules}
    size = None
    try:
        stored, files = _encode_with_recipe(adapter, recipe, form)
        size = stored_size(stored, files)
    except LoraLensError:
        # A result that stays in memory need not fit into any dialect.
        if writing.is_wanted:
            raise
    else:
        writing.write(stored, files)
    # A method may have chosen a default space. The recipe of the result names this space. The recipe that was written
    # to the file names a space only if the user did.
    followed = replace(recipe, space=combination.recipe.space)
    total = combination.total(ranks)
    return CombineResult(
        followed, combination, ranks, nominal_ranks, adapter, form.name, size, rounding, total, writing
    )


def _warn_of_zeros(recipe: Recipe) -> None:
    if not any(
        number for each in recipe.adapters for number in (each.strength.weight, *each.strength.modules.values())
    ):
        warn("every weight is 0: the result does nothing")


def _weigh_blocks(recipe: Recipe, adapters: Sequence[Adapter], blocks: BlockWeights, within: Sequence[str]) -> Recipe:
    """The recipe with the weights of all modules in the shortest form that it has for them."""
    paths = [ingredient.path for ingredient in recipe.adapters]
    rows = match_names(adapters, paths)
    chosen = set(select(rows, within))
    weighed = []
    for t, (ingredient, adapter) in enumerate(zip(recipe.adapters, adapters, strict=True)):
        with place(ingredient.path):
            of_blocks = weights_by_module(adapter, blocks.preset, blocks.block_weights) or {}
        # Another adapter may spell a module in another way, and the recipe has the names of the first one.
        names = {row: own for row, each in rows.items() if (own := each[t]) is not None}
        weights = ingredient.strength.within(rows).by_module(names)
        factors = {row: weights[row] * (of_blocks[own] if row in chosen else 1.0) for row, own in names.items()}
        ((common, _),) = Counter(factors.values()).most_common(1)
        strength = Strength(common, {row: weight for row, weight in factors.items() if weight != common})
        weighed.append(replace(ingredient, strength=strength))
    return replace(recipe, adapters=tuple(weighed))


def read_source(source: AdapterSource, label: str, reading: Reading, base: ModelPath | None) -> Adapter:
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


def _base_weights(recipe: Recipe, adapters: Sequence[Adapter], base: ModelPath | None) -> "Mapping[str, Weight] | None":
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


def _combine(
    recipe: Recipe,
    adapters: Sequence[Adapter],
    form: OutputFormat,
    dtype: FloatType | None,
    weights: "Mapping[str, Weight] | None",
    step: Step | None,
) -> tuple[Combination, Mapping[str, int], Adapter, Mapping[str, Update]]:
    """Combine the adapters, and truncate or pad the result if the recipe says so.

    Returns
    -------
    tuple
        The combination; the ranks to which modules were truncated, none without a rule; the adapter in the dtype that
        is written; and its modules with new factors in float64, at the same ranks.
    """
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
        # float32 holds every number of float16, bfloat16 and float8.
        dtypes = {
            dtype for adapter in adapters for module in adapter.modules.values() for dtype in factor_dtypes(module)
        }
        common = chosen or (dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32))
        ranks, at = _truncate(combination, recipe, form, common)
        adapter = combination.with_magnitudes(with_modules(combination.adapter, at(common)))
        return combination, ranks, adapter, at(np.dtype(np.float64))
    adapter = round_factors(combination.adapter, None)
    # Modules without a lift kept their factors, of which only products of stored tensors are rounded.
    exact = {name: module for name, module in combination.adapter.items() if adapter[name] is not module}
    exact |= {name: lift.at(dtype=np.float64) for name, lift in combination.lifts.items() if name in adapter}
    # Without a rule nothing is cut, so all modules become as wide as the widest.
    if recipe.uniform:
        rank = max(module.rank for module in adapter.modules.values())
        adapter = adapter.map(lambda module: pad_rank(module, rank))
    return combination, {}, adapter, exact


def _truncate(
    combination: Combination, recipe: Recipe, form: OutputFormat, dtype: np.dtype[Any]
) -> tuple[dict[str, int], Callable[[np.dtype[Any]], Mapping[str, Update]]]:
    """Choose the ranks as `compress` does, and return a function that makes the modules of these ranks in any dtype.

    The dtype that is given here only counts for the size of the file.
    """
    from loralens.compression.truncation_plan import TruncationPlan, keeps_rank  # most sums keep all ranks

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
    ranks = TruncationPlan(combination.adapter, own, dtype).ranks(
        Rule.of(recipe.truncate), one_rank=recipe.uniform, drop_dead=recipe.drop_dead, size=size
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


@takes_options
def combine(
    *adapters: WithStrength,
    weights: Sequence[float] | None = None,
    rules: RankRules,
    blocks: BlockWeights,
    recipe: str | PathLike[str] | Recipe | None = None,
    method: str | None = None,
    strength: float | None = None,
    density: float | None = None,
    settings: Mapping[str, float] | Iterable[tuple[str, float]] = (),
    seed: int | None = None,
    space: Space | None = None,
    take: AdapterSource | None = None,
    drop_dead: bool = False,
    uniform: bool = False,
    force: bool = False,
    selection: ModuleChoice,
    writing: Writing,
    reading: Reading,
) -> CombineResult:
    """Combine several adapters, of any ranks and dialects, into one.

    The default is the exact sum, Σ w·ΔW, which has its true rank. Other methods keep a part of it (`ties`, `dare` …).
    Every module is combined alone. One of the rules (``rank``, ``energy``, ``size`` …) truncates the result to fewer
    directions, with the smallest possible error. The result has the names, the dialect and the layout of the first
    adapter. In the shell ADAPTER:0.7 has the weight 0.7, and ADAPTER:-1 is subtracted. With ``preset`` or
    ``block_weights`` each block of an image model has its own weight, which multiplies that of every adapter. The
    metadata of OUT holds the recipe, and ``recipe`` OUT follows it again.

    Parameters
    ----------
    *adapters : path, Adapter, model, (adapter, weight), or a sequence or mapping of them
        ``combine("a", ("b", 0.5))``, ``combine([a, b])``, ``combine({"a": 0.5, "b": 0.5})``. A weight is a number of
        any sign, 1 by default, or a mapping of globs over modules to numbers, of which the last match counts: ``("b",
        {"v_proj": 0.3})``.
    weights : sequence of float, optional
        The weights in the order of the adapters, as PEFT takes them: ``combine([a, b], weights=[0.5, 0.5])``.
    recipe : path or Recipe, optional
        Follow a recipe: a .toml file, or an adapter that combine has written.

        Or the ``recipe`` of a result. It replaces the adapters and all options except those of writing and reading.
    method : str, optional
        How the updates are combined; a wrong name lists all methods. [default: sum]

        A name in `loralens.arithmetic.methods.METHODS`.
    strength : float, optional
        λ, the factor by which the combined update is multiplied. [default: that of the method, mostly 1]
    density : float, optional
        The share of the entries that a sparsifying method keeps.
    settings : mapping of str to float, or pairs
        Another setting of the method, by name; a wrong name lists those that the method has.

        Such as ``{"mu": 1.5}``.
    seed : int, optional
        The seed of a random method.
    space : str, optional
        The space in which an elementwise method works.
    take : path or Adapter, optional
        The adapter whose modules_to_save and biases are written, if several adapters have some; 'none' leaves them out.

        Its path, its name, its number from ``"1"``, or the object that was given.
    drop_dead : bool
        Leave out modules whose update is zero.
    uniform : bool
        Give all modules the same rank, padded with zeros, as LoRAX and mlx-lm require.
    force : bool
        Combine adapters of different image models too.
    rules : RankRules
        The options ``rank``, ``energy``, ``error``, ``sv_ratio``, ``sv_cumulative``, ``parameters``, ``size``.
    blocks : BlockWeights
        The options ``preset``, ``block_weights``.
    selection : ModuleChoice
        The options ``modules``, ``block``.
    writing : Writing
        The options ``output``, ``to``, ``base``, ``dtype``, ``allow_loss``, ``overwrite``, ``dry_run``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        The method is unknown or has no such option, there is no adapter, a weight is not a finite number, a recipe and
        other options or several rules were given, a glob pattern matches no module, or no module is left.
    FormatError
        A file is not an adapter, or not a recipe.
    MismatchError
        The adapters are of different image models or have no module in common, or something cannot be combined, such
        as DoRA without its base, or the modules_to_save of several adapters without ``take``.
    ShapeError
        A module has two shapes, so the adapters belong to two base models.

    Notes
    -----
    Its cost is O((out + in)·ρ²) per module, with ρ = Σr: no ΔW is formed. Only elementwise methods in the space
    ``full`` form ΔW, in blocks of rows.

    Examples
    --------
    $ loralens combine adapter:0.7 other:0.3 -o both
    $ loralens combine adapter other --method ties -o both
    """
    if recipe is not None:
        # All that a recipe states itself. A value of 0 was given by the user; None, () and False are defaults.
        excluded = {
            "strength": strength, "density": density, "settings": settings or None, "method": method, "space": space,
            "seed": seed, "modules": selection.modules or None, "take": take, "drop_dead": drop_dead or None,
            "uniform": uniform or None, "preset": blocks.preset, "block_weights": blocks.block_weights,
            "weights": weights, **rules.stated,
        }  # fmt: skip
        stored = _read_recipe(recipe, adapters, excluded)
        paths = [ingredient.path for ingredient in stored.adapters]
        return follow_recipe(stored, paths, force=force, writing=writing, reading=reading)
    # Refused before anything is read.
    check_choice("space", space, SPACES)
    if strength is not None:
        check_finite("strength", strength)
    # NumPy's SeedSequence, which gives every module its random numbers, accepts no other seeds.
    if seed is not None and (not isinstance(seed, int) or seed < 0):
        raise OptionError(f"seed {seed!r} is not possible", fix="give a whole number of 0 or more")
    if not adapters:
        raise OptionError("no adapter is given", fix="give at least one ADAPTER, or --recipe")
    if weights is not None:
        plain = sources(cast("Sequence[Source]", adapters))
        adapters = tuple(_with_weights(plain, weights))
    pairs = sources_with_strengths(adapters)
    rule = rules.optional()
    combination = Recipe(
        ingredients(pairs),
        # On held-out tasks thirteen of eighteen methods could not be told apart, and the exact sum, which needs no
        # setting, is one of them (docs/commands/combine.md).
        method=method or "sum",
        options=_method_options(strength, density, settings),
        space=space,
        seed=seed or 0,
        modules=selection.globs,
        take=label_of_taken(take, pairs),
        drop_dead=drop_dead,
        truncate=rule.values if rule else {},
        uniform=uniform,
    )
    originals = [source for source, _ in pairs]
    return follow_recipe(combination, originals, force=force, blocks=blocks, writing=writing, reading=reading)


def _with_weights(adapters: Sequence[AdapterSource], weights: Sequence[float]) -> list[Any]:
    """The adapters with the weights of a list beside them."""
    numbers = list(weights)
    if len(numbers) != len(adapters):
        what = f"{count(len(adapters), 'adapter')} and {count(len(numbers), 'weight')}"
        raise OptionError(what, fix="give one weight for each adapter, in their order")
    return list(zip(adapters, numbers, strict=True))


def _read_recipe(
    recipe: str | PathLike[str] | Recipe, adapters: Sequence[WithStrength], excluded: Mapping[str, Any]
) -> Recipe:
    """Read a recipe, or refuse it if adapters or an option in ``excluded``, which it states itself, were given too."""
    names = [option_names(name) for name, value in excluded.items() if value is not None]
    names += ["ADAPTER"] if adapters else []
    if names:
        raise OptionError(
            f"{', '.join(names)} and --recipe exclude each other, because the recipe contains them",
            fix=f"leave out --recipe, or {', '.join(names)}",
        )
    # Paths in a TOML file are relative to its folder, and read_recipe resolves them.
    return recipe if isinstance(recipe, Recipe) else read_recipe(Path(recipe))


def _method_options(
    strength: float | None, density: float | None, settings: Mapping[str, float] | Iterable[tuple[str, float]]
) -> dict[str, float]:
    """The options of the method that were given. The method itself refuses a name or a value that it does not have."""
    try:
        # Papers call the factor of the combined update λ, and recipes have it as ``lam``.
        options = {"lam": strength, "density": density, **dict(settings)}
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"settings {settings!r} is not a mapping of names to numbers", fix='give {"mu": 1.5}'
        ) from error
    # Text from Python, such as "0.5", would fail deep inside a method.
    for name, value in options.items():
        if value is not None and not isinstance(value, Real):
            raise OptionError(f"{name} {value!r} is not a number", fix="give a number")
    return {name: float(value) for name, value in options.items() if value is not None}
