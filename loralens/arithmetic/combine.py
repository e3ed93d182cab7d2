"""The combination of several adapters into one, by any method of the table, and the quality of the result."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, prod
from typing import TYPE_CHECKING, Any, Literal, final
from zlib import crc32

import numpy as np
from numpy.typing import DTypeLike

from loralens.arithmetic.methods import METHODS, CombiningMethod, find_combining_method
from loralens.arithmetic.quality import CombinationQuality, Quality, relative, total_quality
from loralens.choices import Space
from loralens.core.adapter import Adapter
from loralens.core.joint import Core, Joint, Lift
from loralens.core.lowrank import LowRank
from loralens.core.selection import select
from loralens.core.stored import Ingredient, Recipe, Strength
from loralens.core.structured import Update, factor_dtypes
from loralens.core.threads import Step, in_threads
from loralens.core.together import (
    NONE,
    Row,
    assemble_adapter,
    check_combinable,
    combine_extras,
    keep_modules,
    match_modules,
    single_module,
)
from loralens.errors import OptionError, place
from loralens.linalg.factor import Floats

if TYPE_CHECKING:  # only DoRA needs them
    from loralens.arithmetic.dora import DoraCombination, RowScalings, Weights


Weight = float | Mapping[str, float] | Strength


@final
@dataclass(frozen=True, slots=True)
class Combination:
    """An adapter that was combined from others.

    Attributes
    ----------
    modules : mapping of str to Quality
        How much of the exact sum and of every adapter each module contains, before its factors were rounded. Modules
        that were left out because they are 0 are included.
    lifts : mapping of str to Lift
        The new factors at any rank. Modules that keep the factors of the one adapter that has them are left out.
    notes : tuple of str
        Further sentences for the user, such as about tensors that were left out.
    truncation : mapping of str to float
        For an elementwise method in the full space: the relative error that its result, which has full rank, lost when
        it was cut to the rank of the sum.
    row_scalings : RowScalings, optional
        For DoRA adapters: the change besides the pairs. ``lifts`` then belong to the new DoRA adapter.
    """

    adapter: Adapter
    modules: Mapping[str, Quality]
    recipe: Recipe
    lifts: Mapping[str, Lift] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    truncation: Mapping[str, float] = field(default_factory=dict)
    row_scalings: "RowScalings | None" = None

    def with_magnitudes(self, adapter: Adapter) -> Adapter:
        """Return ``adapter``, which was made of the ``lifts`` at other ranks, with its own magnitudes if it is DoRA."""
        # Magnitudes are lengths of rows of W plus the factors as they were rounded, so they are made last.
        return self.row_scalings.with_magnitudes(adapter) if self.row_scalings else adapter

    def total(self, ranks: Mapping[str, int] | None = None) -> CombinationQuality:
        """Return the quality over all modules, each cut to its rank in ``ranks`` if it has one there."""
        ranks, before = ranks or {}, self.truncation
        return total_quality(
            (quality, ranks.get(name), before.get(name, 0.0)) for name, quality in self.modules.items()
        )

    def truncated(self, name: str, rank: int | None = None) -> float:
        """Return ‖F − R‖/‖F‖ of one module, where F is the result of the method and R is F cut to ``rank``."""
        return relative(*self.modules[name].truncation(rank, self.truncation.get(name, 0.0))) or 0.0


def combine_adapters(
    adapters: Sequence[tuple[Adapter, Weight]],
    *,
    method: str = "sum",
    lam: float | None = None,
    density: float | None = None,
    seed: int = 0,
    space: Space | None = None,
    modules: Sequence[str] = (),
    take: int | Literal["none"] | None = None,
    dtype: DTypeLike | None = None,
    drop_dead: bool = False,
    width: int = 0,
    labels: Sequence[str] = (),
    weights: "Weights | None" = None,
    threads: int = 1,
    step: Step | None = None,
    **options: float,
) -> Combination:
    """Combine adapters into one: R = method(w_1 ΔW_1, …, w_T ΔW_T), module by module.

    Parameters
    ----------
    adapters : sequence of (Adapter, weight)
        A weight is a number of any sign, or a mapping of glob → number whose last match counts (1 where none does).
        The result has the names, dialect, metadata and layout of the first adapter. A module that an adapter lacks
        counts as ΔW = 0.
    method : str
        A row of `loralens.arithmetic.methods.METHODS`. ``sum`` is exact for any mix of ranks, scales and dialects.
    lam : float, optional
        λ, the strength of the result. By default that of the method, mostly 1.
    density, **options : float
        Further options of the method; see its row.
    seed : int
        The seed of methods with random numbers. Every module has random numbers of its own.
    space : "full", "knots" or "core", optional
        The space in which an elementwise method acts. To other methods it makes no difference.
    modules : sequence of str
        Globs or kinds: only these modules are in the result.
    take : int or "none", optional
        The index of the adapter whose fully trained tensors (heads, biases, embeddings) the result gets if several
        adapters have such tensors.
    dtype : dtype, optional
        The dtype of the new factors. By default the dtype that all factors of a module share (for DoRA: all factors of
        all adapters), else float32.
    drop_dead : bool
        Leave out modules that come out as 0, instead of writing them with rank 1 of zeros.
    width : int
        For an elementwise method in the full space, whose result has full rank: the number of directions to keep. It
        keeps Σr directions, as the exact sum has, if that is more.
    labels : sequence of str
        The names of the adapters in messages and in the recipe.
    weights : mapping of str to Weight, optional
        Base weights, under the module names of any of the adapters. With them ``sum`` and ``average`` combine DoRA
        adapters exactly, and the result is DoRA (`loralens.arithmetic.dora`).
    threads : int
        Modules worked on at a time. More than one pays only where BLAS itself uses one thread.
    step : callable, optional
        Called with 1 after every module; twice for every module if the method looks at all of them first (ties).

    Returns
    -------
    Combination

    Raises
    ------
    OptionError
        The method is unknown or has no such option, there is no adapter, a weight is not finite, or no module is left.
    MismatchError
        The adapters have no module in common, or something in them cannot be combined: DoRA without the base, fully
        trained tensors in several adapters, or updates that are not pairs.
    ShapeError
        A module has two shapes, so the adapters belong to two base models.

    Notes
    -----
    No matrix of size out × in is formed: all rules except elementwise ones in the full space work on cores of size
    Σr × Σr (`loralens.core.joint.Joint`). The new factors have the numerical rank of the result and the scale 1;
    `truncate` makes them narrower. In a plain sum, a module that only one adapter has keeps its factors bit for bit.
    """
    row = find_combining_method(method, METHODS)
    options_given = {"lam": lam, "density": density, **options}
    settings = row.settings(options_given, space)
    # slerp has two ends; all other methods take any number.
    if not adapters or (row.adapters and len(adapters) != row.adapters):
        raise OptionError(
            f"{row.name} takes {row.adapters or 'at least 1'} adapters, not {len(adapters)}",
            fix="give that number of adapters, or another --method",
        )
    labels = _labels(labels, len(adapters), take)
    strengths = [_strength(weight, label) for (_, weight), label in zip(adapters, labels, strict=True)]
    recipe = Recipe(
        tuple(map(Ingredient, labels, strengths)),
        method=method,
        options={name: value for name, value in options_given.items() if value is not None},
        space=settings.get("space"),
        seed=seed if row.seeded else 0,
        modules=tuple(modules),
        take=take if take is None or take == "none" else labels[take],
        drop_dead=drop_dead,
    )
    sources = [adapter for adapter, _ in adapters]
    dora = None
    if weights is not None:
        from loralens.arithmetic.dora import DoraCombination  # it takes 6 ms, and few adapters are DoRA

        dora = DoraCombination.of(sources, labels, row, weights, threads)
    plain = dora.plain if dora else sources
    dtype = _common_dtype(sources) if dora and dtype is None else dtype
    rows, weights_by_module = _rows(plain, recipe, labels)
    work = CombiningWork(row, settings, rows, weights_by_module, labels, seed, dtype, dora, width)
    results = work.combine_all(threads, step)
    row_scalings = dora.row_scalings(rows, work.h) if dora else None
    lifts = {name: lift for name, (lift, _) in results.items() if name not in work.stay}
    if row_scalings:
        lifts = {name: row_scalings.pair(name, lift) for name, lift in lifts.items()}
    updates: dict[str, Update] = {name: work.stay.get(name) or lifts[name].at(dtype=dtype) for name in results}
    qualities = {name: quality for name, (_, quality) in results.items()}
    extras = combine_extras(
        plain,
        lambda t, name: strengths[t].of(name),
        labels=labels,
        take=NONE if take == "none" else take,
        factors_stay=len(work.stay) == len(rows),
    )
    alive = _alive(updates, qualities, work.row_scaled) if drop_dead else updates
    combined = assemble_adapter(plain[0], alive, extras)
    notes = (*extras.notes, *(dora.notes(row_scalings) if dora and row_scalings else ()))
    combination = Combination(combined, qualities, recipe, lifts, notes, work.truncation, row_scalings)
    return replace(combination, adapter=combination.with_magnitudes(combined))


def _alive(
    updates: Mapping[str, Update], qualities: Mapping[str, Quality], row_scaled: Collection[str]
) -> dict[str, Update]:
    """The modules whose result is not 0."""
    # A module may have no pair left and still scale the rows of W.
    alive = {name: update for name, update in updates.items() if qualities[name].s.size or name in row_scaled}
    if not alive:
        raise OptionError("nothing is left: every module comes out as 0", fix="leave out --drop-dead")
    return alive


def _labels(labels: Sequence[str], count: int, take: int | Literal["none"] | None) -> list[str]:
    """The given labels of the adapters, or numbers. Raises an OptionError if ``take`` is not an adapter's index."""
    if labels and len(labels) != count:
        raise OptionError(f"{len(labels)} labels for {count} adapters", fix="give one label for each adapter, or none")
    if take not in (None, "none", *range(count)):
        raise OptionError(f"take={take!r} is not the position of an adapter", fix=f"give 0 to {count - 1}, or 'none'")
    return list(labels) or [f"adapter {t}" for t in range(1, count + 1)]


def _strength(weight: Weight, label: str) -> Strength:
    """The weight as a `Strength`. Raises an OptionError if a number in it is not finite."""
    if isinstance(weight, Strength):
        strength = weight
    else:
        strength = Strength(1.0, dict(weight)) if isinstance(weight, Mapping) else Strength(float(weight))
    for number in (strength.weight, *strength.modules.values()):
        if not isfinite(number):
            raise OptionError(f"{label} has the weight {number}, which is not finite", fix="give a finite number")
    return strength


def _common_dtype(adapters: Sequence[Adapter]) -> DTypeLike:
    """The dtype that all factors of all pairs share, else float32."""
    # For DoRA: the pairs diag(g) L are float64, so the dtype is that of the adapters as they were given.
    pairs = [module for adapter in adapters for module in adapter.modules.values() if isinstance(module, LowRank)]
    dtypes = {dtype for pair in pairs for dtype in factor_dtypes(pair)}
    # Of two 16-bit dtypes neither holds the numbers of the other.
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def _rows(
    adapters: Sequence[Adapter], recipe: Recipe, labels: Sequence[str]
) -> tuple[dict[str, Row], dict[str, list[float]]]:
    """The modules of the result, and the weight of every adapter in each of them.

    A module that only adapters of weight 0 have is left out, unless the first adapter has it: the result keeps the
    module names of the first adapter.

    Raises
    ------
    OptionError
        Every module is left out.
    """
    rows = match_modules(adapters, labels)
    strengths = recipe.strengths_of(rows)
    chosen = select(rows, recipe.modules)
    by_adapter = [strength.by_module(chosen) for strength in strengths]
    weights = {name: [weights[name] for weights in by_adapter] for name in chosen}
    names = [
        name
        for name in chosen
        if rows[name][0] is not None
        or any(w and update is not None for w, update in zip(weights[name], rows[name], strict=True))
    ]
    if chosen and not names:
        raise OptionError(
            "nothing is left: the weights are 0 in all modules",
            fix="give other weights, or choose other modules with --modules",
        )
    return {name: rows[name] for name in names}, {name: weights[name] for name in names}


@dataclass(slots=True)
class CombiningWork:
    """The combination of every module, with the settings that all of them share."""

    row: CombiningMethod
    settings: Mapping[str, Any]
    rows: Mapping[str, Row]
    weights: Mapping[str, Sequence[float]]
    labels: Sequence[str]
    seed: int
    dtype: DTypeLike | None
    dora: "DoraCombination | None"
    width: int
    stay: Mapping[str, Update] = field(default_factory=dict)
    truncation: dict[str, float] = field(default_factory=dict)
    h: dict[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # In a plain sum a module of one adapter keeps its stored factors; DoRA factors change with the row scaling.
        if self.row.name == "sum" and self.settings["lam"] == 1 and not self.dora:
            pairs = {name: single_module(row, self.weights[name], self.dtype) for name, row in self.rows.items()}
            self.stay = keep_modules(self.rows, pairs)

    @property
    def row_scaled(self) -> set[str]:
        """Names of the modules whose combination scales rows of the base weight."""
        return {name for name, h in self.h.items() if h.any()}

    def combine_all(self, threads: int, step: Step | None) -> dict[str, tuple[Lift, Quality]]:
        """Combine every module. A method with `CombiningMethod.prepare` looks at all of them before."""
        if self.row.prepare:
            from loralens.arithmetic.elementwise import Modules  # elementwise methods take 10 ms to import

            shapes = [next(update.shape for update in row if update is not None) for row in self.rows.values()]
            modules = Modules(list(self.rows), self.joint, sum(map(prod, shapes)), threads, step)
            self.settings = {**self.settings, **self.row.prepare(modules, **self.settings)}
        return in_threads(self.combine_module, list(self.rows), threads, step)

    # Huge updates overflow in float32 products. The result is checked, so a warning of NumPy would only come twice.
    @np.errstate(over="ignore", invalid="ignore")
    def combine_module(self, name: str) -> tuple[Lift, Quality]:
        """Return the combination of one module, and its quality."""
        space = self.joint(name)
        with place(name):
            # Of a module that stays, the core is computed for the quality only.
            joint, matrix = (space, space.total()) if name in self.stay else self._apply_rule(name, space)
            core = joint.decompose(matrix)
            quality = Quality.of(joint, core, len(self.labels))
            if self.dora:
                quality = self._add_row_scalings(name, joint, core, quality)
            # The result of an elementwise method is float32, whatever the factors of the adapters are.
            return replace(joint.to_lift(core), dtype=space.dtype), quality

    def _add_row_scalings(self, name: str, joint: Joint, core: Core, quality: Quality) -> Quality:
        """The quality of a DoRA module with its row scaling, which is noted."""
        from loralens.arithmetic.dora import add_row_scalings  # only DoRA needs it

        assert self.dora
        row_changes = self.dora.row_changes(name, joint.shape[0])
        # The rule is linear, so it combines the row scalings as it combines the cores.
        h = self.row.rule(replace(joint, cores=row_changes[:, None, :]), **self.settings)
        assert isinstance(h, np.ndarray)
        self.h[name] = h[0]
        return add_row_scalings(quality, joint, core, row_changes, h[0], self.dora.weight(name))

    def joint(self, name: str) -> Joint:
        """Return the joint space of one module."""
        # Made again for every pass and not kept: the joint spaces of a large adapter would fill the memory.
        # A module that stays as it is may be of a kind that cannot be combined, such as LoKr.
        if name not in self.stay:
            check_combinable(name, self.rows[name], self.labels)
        with place(name):
            return replace(Joint.of(self.rows[name], self.weights[name]), width=self.width)

    def _apply_rule(self, name: str, joint: Joint) -> tuple[Joint, Floats | Core]:
        """The joint space in which the result of the rule on one module lies, and the result as a core matrix."""
        # The seed depends on the name, so a module draws the same numbers whichever others are combined.
        seed = {"seed": np.random.SeedSequence([self.seed, crc32(name.encode())])} if self.row.seeded else {}
        result = self.row.rule(joint, **self.settings, **seed)
        # Rules return cores, an SVD, an update, or an update with its error: see `CombiningMethod.rule`.
        # What remains is a `Fused`, whose room is imported by the elementwise methods alone.
        if not isinstance(result, np.ndarray | Core | LowRank):
            self.truncation[name], result = result.truncation, result.update
        if not isinstance(result, LowRank):
            return joint, result
        # The result is outside the space of the updates. A joint space of both is needed to compare them.
        wider = Joint.of([*self.rows[name], result], [*self.weights[name], 0.0])
        return wider, wider.cores[-1]
