"""Several adapters as one, by any method of the table, and what came of each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final
from zlib import crc32

import numpy as np
from numpy.typing import DTypeLike

from loralens.arithmetic.fused import Fused
from loralens.arithmetic.method import Method, Space, method_named
from loralens.arithmetic.methods import METHODS
from loralens.arithmetic.quality import Quality, Total, total
from loralens.core.adapter import Adapter
from loralens.core.carried import NONE, carried
from loralens.core.joint import Core, Joint, Lift
from loralens.core.lowrank import LowRank
from loralens.core.names import select
from loralens.core.recipe import Ingredient, Recipe, Strength
from loralens.core.structured import Update
from loralens.core.threads import in_threads
from loralens.core.together import Row, checked, keepable, kept, together
from loralens.core.vector import assembled
from loralens.errors import OptionError, place

Weight = float | Mapping[str, float] | Strength


@final
@dataclass(frozen=True, slots=True)
class Combination:
    """An adapter combined of others.

    Attributes
    ----------
    adapter : Adapter
    modules : mapping of str to Quality
        What each of its modules has of the exact sum and of every adapter, before its factors were rounded. Modules
        that were left out as 0 are here too.
    recipe : Recipe
    lifts : mapping of str to Lift
        The new factors at any rank; without modules that keep those of the one adapter that has them.
    notes : tuple of str
        What else there is to say.
    truncation : mapping of str to float
        Of an elementwise method: what its result lost, relative to it, before it had the ranks of the sum.
    """

    adapter: Adapter
    modules: Mapping[str, Quality]
    recipe: Recipe
    lifts: Mapping[str, Lift] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    truncation: Mapping[str, float] = field(default_factory=dict)

    def total(self, ranks: Mapping[str, int] | None = None) -> Total:
        """Over all modules, cut to these ranks where they are given."""
        ranks = ranks or {}
        return total((one, ranks.get(name)) for name, one in self.modules.items())


def combine(
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
    labels: Sequence[str] = (),
    threads: int = 1,
    **options: float,
) -> Combination:
    """One adapter of several: R = method(w_1 ΔW_1, …, w_T ΔW_T), module by module.

    Parameters
    ----------
    adapters : sequence of (Adapter, weight)
        A weight is a number of any sign, or a mapping of glob → number whose last match counts (1 where none does).
        Names, dialect, metadata and layout are those of the first adapter. Modules that an adapter lacks count as
        ΔW = 0.
    method : str
        A row of `loralens.arithmetic.methods.METHODS`. ``sum`` is exact for any mix of ranks, scales and dialects.
    lam : float, optional
        λ, the strength of the result; as the method has it, mostly 1.
    density, **options : float
        What else a method can be told: see its row.
    seed : int
        Of methods that draw random numbers; every module draws its own.
    space : "full", "knots" or "core", optional
        Where an elementwise method acts. The others come out the same in any of them.
    modules : sequence of str
        Globs or kinds: only these modules are in the result.
    take : int or "none", optional
        Whose tensors trained in full (heads, biases, embeddings) stand, by place, where several adapters have them.
    dtype : dtype, optional
        Of the new factors: the one that all factors of a module have, else float32, if it is not given.
    drop_dead : bool
        Leave out modules that come out as 0, instead of writing them with rank 1 of zeros.
    labels : sequence of str
        What the adapters are called in messages and in the recipe.
    threads : int
        Modules worked on at a time. More than one pays only where BLAS itself uses one thread.

    Raises
    ------
    OptionError
        An unknown method, an option that it does not have, no adapter, nothing left.
    MismatchError
        No module in common; what cannot be combined: DoRA, full tensors in several, updates that are no pair.
    ShapeError
        A module of two shapes: two base models.

    Notes
    -----
    Nothing of size out × in is formed: all rules but elementwise ones in the full space work on cores of size Σr × Σr
    (`loralens.core.joint.Joint`). New factors have the numerical rank of the result under scale 1; `truncate` makes
    them narrower. In a plain sum a module that only one adapter has keeps its factors to the bit.
    """
    row = method_named(method, METHODS)
    given = {"lam": lam, "density": density, **options}
    settings = row.settings(given, space)
    labels = list(labels) or [f"adapter {t}" for t in range(1, len(adapters) + 1)]
    _check_count(row, len(adapters))
    strengths = [_strength(weight) for _, weight in adapters]
    recipe = Recipe(
        tuple(map(Ingredient, labels, strengths)),
        method=method,
        options={name: value for name, value in given.items() if value is not None},
        space=settings.get("space"),
        seed=seed if row.seeded else 0,
        modules=tuple(modules),
        take=take if take is None or take == "none" else labels[take],
        drop_dead=drop_dead,
    )
    rows, weights = _rows([adapter for adapter, _ in adapters], recipe, labels)
    work = _Work(row, settings, rows, weights, labels, seed, dtype, stay=_stays(row, settings))
    made = in_threads(work.one, list(rows), threads)
    lifts = {name: lift for name, (lift, _) in made.items() if name not in work.stay}
    updates: dict[str, Update] = {name: work.stay.get(name) or lift.at(dtype=dtype) for name, (lift, _) in made.items()}
    qualities = {name: quality for name, (_, quality) in made.items()}
    rest = carried(
        [adapter for adapter, _ in adapters],
        lambda t, name: strengths[t].of(name),
        labels=labels,
        take=NONE if take == "none" else take,
        factors_stay=len(work.stay) == len(rows),
    )
    dead = [name for name, one in qualities.items() if not one.s.size] if drop_dead else []
    if len(dead) == len(updates):
        raise OptionError("nothing is left: every module comes out as 0", fix="leave out --drop-dead")
    updates = {name: update for name, update in updates.items() if name not in dead}
    combined = assembled(adapters[0][0], updates, rest)
    return Combination(combined, qualities, recipe, lifts, rest.notes, work.truncation)


def _check_count(row: Method, count: int) -> None:
    if not count or (row.adapters and count != row.adapters):
        wanted = row.adapters or "at least 1"
        raise OptionError(f"{row.name} takes {wanted} adapters, not {count}", fix="give as many as it takes")


def _strength(weight: Weight) -> Strength:
    if isinstance(weight, Strength):
        return weight
    return Strength(1.0, dict(weight)) if isinstance(weight, Mapping) else Strength(float(weight))


def _stays(row: Method, settings: Mapping[str, Any]) -> bool:
    """Whether a module that one adapter alone has comes out as it is."""
    return row.name == "sum" and settings["lam"] == 1


def _rows(
    adapters: Sequence[Adapter], recipe: Recipe, labels: Sequence[str]
) -> tuple[dict[str, Row], dict[str, list[float]]]:
    """The modules of the result and how strongly each adapter counts in them.

    A module that only adapters of weight 0 have, the first one not among them, is not in the result.
    """
    rows = together(adapters, labels)
    recipe.check_globs(rows)
    chosen = select(rows, recipe.modules)
    weights = {name: [one.strength.of(name) for one in recipe.adapters] for name in chosen}
    counts = {
        name: rows[name][0] is not None
        or any(w and update is not None for w, update in zip(weights[name], rows[name], strict=True))
        for name in chosen
    }
    names = [name for name in chosen if counts[name]]
    return {name: rows[name] for name in names}, {name: weights[name] for name in names}


class _Work:
    """What is done to every module."""

    def __init__(
        self,
        row: Method,
        settings: Mapping[str, Any],
        rows: Mapping[str, Row],
        weights: Mapping[str, Sequence[float]],
        labels: Sequence[str],
        seed: int,
        dtype: DTypeLike | None,
        *,
        stay: bool,
    ) -> None:
        self.rule: Callable[..., Any] = row.rule
        self.settings, self.rows, self.weights, self.labels = settings, rows, weights, labels
        self.seed = seed if row.seeded else None
        found = {name: kept(rows[name], weights[name], dtype) if stay else None for name in rows}
        self.stay = keepable(rows, found)
        self.truncation: dict[str, float] = {}
        if row.prepare:
            self.settings = {**settings, **row.prepare(self.joints, **settings)}

    def one(self, name: str) -> tuple[Lift, Quality]:
        """The combination of one module, and what it has of the others."""
        if name not in self.stay:
            checked(name, self.rows[name], self.labels)
        with place(name):
            joint = Joint.of(self.rows[name], self.weights[name])
            if name in self.stay:
                core = joint.decomposed(joint.total())
            else:
                joint, core = self._ruled(name, joint)
            return joint.lifted(core), Quality.of(joint, core, len(self.labels))

    def joints(self) -> Iterator[Joint]:
        """All modules, one after the other."""
        for name, row in self.rows.items():
            checked(name, row, self.labels)
            with place(name):
                joint = Joint.of(row, self.weights[name])
            yield joint

    def _ruled(self, name: str, joint: Joint) -> tuple[Joint, Core]:
        """What the rule makes of a module, and the joint space that it is in."""
        drawn = {} if self.seed is None else {"seed": np.random.SeedSequence([self.seed, crc32(name.encode())])}
        found = self.rule(joint, **self.settings, **drawn)
        if isinstance(found, Fused):
            self.truncation[name], found = found.truncation, found.update
        if not isinstance(found, LowRank):
            return joint, joint.decomposed(found)
        wider = Joint.of([*self.rows[name], found], [*self.weights[name], 0.0])  # it has left the space of its updates
        return wider, wider.decomposed(wider.cores[-1])
