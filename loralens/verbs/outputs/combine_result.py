"""The result of the verbs that combine adapters, with one row per module and one row per adapter."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from loralens.arithmetic.combine import Combination
from loralens.arithmetic.quality import AdapterShare, CombinationQuality
from loralens.core.adapter import Adapter
from loralens.core.naming.selection import glob_in_words
from loralens.core.recipe import Ingredient, Recipe
from loralens.tables.numbers import MINUS, count, fixed, join_words, number, percent, shape, size
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.outputs.rounding import RoundingCost
from loralens.verbs.outputs.target import Target, Written

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


@dataclass(frozen=True, slots=True)
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
    """

    recipe: Recipe
    combination: Combination
    ranks: Mapping[str, int]
    nominal_ranks: Mapping[str, list[int]]
    adapter: Adapter
    format: str
    size: int | None
    rounding: RoundingCost | None
    target: Target

    def __repr__(self) -> str:
        adapters = len(self.recipe.adapters)
        return f"CombineResult({self.recipe.method} of {adapters} adapters, {len(self.adapter)} modules, {self.format})"

    @property
    def total(self) -> CombinationQuality:
        """The errors over all modules, and the share of each adapter in the result."""
        return self.combination.total(self.ranks)

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

    def record(self) -> dict[str, Any]:
        """The result as a JSON object."""
        total, table, recipe = self.total, self._adapters_table(), self.recipe.record()
        # JSON has no infinity, which only an option may be. The recipe in the metadata of a file keeps it.
        if "options" in recipe:
            recipe["options"] = {name: value if isfinite(value) else None for name, value in recipe["options"].items()}
        return {
            "target": self.target.record(),
            "format": self.format,
            "method": self.recipe.method,
            # Methods that commute with rotations have no space of their own; they work on the small cores.
            "space": self.recipe.space or "core",
            "adapters": [{**row.ingredient.record(), **table.record(row)} for row in table.rows],
            "modules": self._modules_table().records(),
            "total": {
                "error_to_sum": total.error_to_sum,
                "truncation": total.truncation,
                "rounding": self.rounding.record() if self.rounding else None,
                "modules": len(self.adapter),
                "parameters": self.adapter.parameters,
                "bytes": self.size,
            },
            "recipe": recipe,
            "notes": list(self.combination.notes),
        }

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


def _ranks(ranks: Sequence[int]) -> str:
    return " + ".join(str(rank) if rank else "–" for rank in ranks)


# In column r, "–" means that the adapter lacks the module; in r', "gone" means that the result does. The error and the
# new rank are what methods are compared by, so a narrow terminal keeps these columns.
MODULE_COLUMNS: tuple[Column[CombinedModule], ...] = (
    Column("name", lambda row: row.name, "module", align="left", priority=ALWAYS),
    Column("shape", lambda row: row.shape, "out × in", lambda sizes: shape(sizes or ()), csv=False, priority=4),
    Column("out", lambda row: row.shape and row.shape[0], json=False),
    Column("in", lambda row: row.shape and row.shape[1], json=False),
    Column("ranks_before", lambda row: row.ranks_before, "r", _ranks, priority=5),
    Column("rank", lambda row: row.rank, "r'", lambda rank: str(rank or "gone"), priority=ALWAYS),
    Column("truncation", lambda row: row.truncation, "truncation", _error, priority=6),
    Column("error_to_sum", lambda row: row.error_to_sum, "error", _error, priority=ALWAYS),
)

# JSON has the weight from the record of the ingredient, with its exceptions by module, which one column cannot state.
ADAPTER_COLUMNS: tuple[Column[CombinedAdapter], ...] = (
    Column("path", lambda row: row.ingredient.path, "adapter", align="left", priority=ALWAYS),
    Column(
        "strength",
        lambda row: row.ingredient.strength,
        "weight",
        lambda strength: number(strength.weight, 6) + (" *" if strength.modules else ""),
        json=False,
        csv=False,
        priority=8,
    ),
    Column("retained", lambda row: row.share.retained, "retained", percent, priority=ALWAYS),
    Column("gain", lambda row: row.share.gain, "gain", fixed(".3f"), priority=ALWAYS),
    Column(
        ("interference", "before"),
        lambda row: row.share.interference_before,
        "interference in the sum",
        fixed(".3f"),
        priority=3,
    ),
    Column(
        ("interference", "after"),
        lambda row: row.share.interference_after,
        "in the result",
        fixed(".3f"),
        priority=2,
    ),
)
