"""Recipe: how an adapter was combined of others, as plain data that can be written down and followed again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from sys import float_info
from typing import Any, Self, final

from loralens.core.clock import Clock
from loralens.core.names import FEWER_GLOBS, matches, select
from loralens.errors import FormatError, place

FIELDS = ("adapters", "method", "options", "space", "seed", "modules", "take", "drop_dead", "truncate", "uniform")
PRINTED = 10**4300  # from here on Python writes no whole number as text, and reads none
SHAPE = 'write method = "sum" and, for every adapter, [[adapters]] with path and weight'


@final
@dataclass(frozen=True, slots=True)
class Strength:
    """How strongly an adapter counts: a weight, and others for the modules that globs match, the last match first.

    Attributes
    ----------
    weight : float
    modules : mapping of str to float
        Glob over module names, or kind → weight.
    clock : Clock
        What finding the globs of modules may take, as recipes come out of files.
    """

    weight: float = 1.0
    modules: Mapping[str, float] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock, compare=False, repr=False)

    @property
    def plain(self) -> bool:
        """Whether it is 1 everywhere."""
        return self.weight == 1 and not self.modules

    def of(self, name: str) -> float:
        """In the module of this name."""
        last = self.weight
        with self.clock.running(f"weights for {len(self.modules):,} globs", fix=FEWER_GLOBS):
            for glob, weight in reversed([*self.modules.items()]):
                if matches(name, glob):
                    last = weight
                    break
        return float(last)


@final
@dataclass(frozen=True, slots=True)
class Ingredient:
    """An adapter of a recipe: its path, or what else it is called, and how strongly it counts."""

    path: str
    strength: Strength = Strength()

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        each = {"modules": dict(self.strength.modules)} if self.strength.modules else {}
        return {"path": self.path, "weight": self.strength.weight, **each}


@final
@dataclass(frozen=True, slots=True)
class Recipe:
    """Adapters, weights, method and truncation.

    Attributes
    ----------
    adapters : tuple of Ingredient
    method : str
    options : mapping of str to float
        Of the method, those that are not as it has them.
    space : str or None
    seed : int
    modules : tuple of str
        Globs: only these modules are in the result; all where there is none.
    take : str or None
        The path of the adapter whose tensors trained in full stand, or ``none``.
    drop_dead : bool
        Modules that come out as 0 are left out.
    truncate : mapping of str to float
        The rule by which ranks are chosen afterwards, if any: ``rank``, ``energy``, ``size`` …
    uniform : bool
        One rank everywhere.
    """

    adapters: tuple[Ingredient, ...]
    method: str = "sum"
    options: Mapping[str, float] = field(default_factory=dict)
    space: str | None = None
    seed: int = 0
    modules: tuple[str, ...] = ()
    take: str | None = None
    drop_dead: bool = False
    truncate: Mapping[str, float] = field(default_factory=dict)
    uniform: bool = False

    def check_globs(self, names: Mapping[str, object]) -> None:
        """Refuse a glob that matches none of these modules, with the nearest names."""
        for one in self.adapters:
            select(names, tuple(one.strength.modules))

    def record(self) -> dict[str, Any]:
        """As a JSON object, without what is as by default."""
        said: dict[str, Any] = {
            "method": self.method,
            "options": dict(self.options),
            "space": self.space,
            "seed": self.seed,
            "modules": list(self.modules),
            "take": self.take,
            "drop_dead": self.drop_dead,
            "truncate": dict(self.truncate),
            "uniform": self.uniform,
        }
        kept = {key: value for key, value in said.items() if value or key == "method"}
        return {**kept, "adapters": [one.record() for one in self.adapters]}

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Self:
        """The recipe that a JSON or TOML object says.

        Raises
        ------
        FormatError
            An unknown field, or one of another type; no adapters; a number that is none or that float64 cannot hold; a
            seed below 0. Only an option may be infinite.
        """
        _known(said, FIELDS)
        adapters = said.get("adapters")
        if not isinstance(adapters, list) or not adapters:
            raise FormatError("names no adapters", fix=SHAPE)
        return cls(
            tuple(_ingredient(one) for one in adapters),
            method=_typed(said, "method", str, "sum"),
            options=_numbers(said.get("options", {}), "options", infinite=True),
            space=_typed(said, "space", str, None),
            seed=_seed(said),
            modules=_globs(said),
            take=_typed(said, "take", str, None),
            drop_dead=_typed(said, "drop_dead", bool, default=False),
            truncate=_rule(said),
            uniform=_typed(said, "uniform", bool, default=False),
        )


def _ingredient(said: Any) -> Ingredient:
    if not isinstance(said, dict):
        raise FormatError("an adapter is not a table", fix=SHAPE)
    _known(said, ("path", "weight", "modules"))
    path = _typed(said, "path", str, "")
    if not path:
        raise FormatError("an adapter has no path", fix=SHAPE)
    with place(path):
        weights = _numbers({"weight": said.get("weight", 1.0)}, "adapters")
        modules = _numbers(said.get("modules", {}), "adapters.modules")
    return Ingredient(path, Strength(weights["weight"], modules))


def _seed(said: Mapping[str, Any]) -> int:
    seed: int = _typed(said, "seed", int, 0)
    if not 0 <= seed < PRINTED:
        what = f"is {seed}" if seed < 0 else "has more digits than Python reads and writes"
        raise FormatError(f"seed {what}", fix="write a whole number from 0")
    return seed


def _rule(said: Mapping[str, Any]) -> dict[str, float]:
    rules = _numbers(said.get("truncate", {}), "truncate")
    if len(rules) > 1:
        raise FormatError(f"truncate has {len(rules)} rules", fix="write one, for example truncate = { rank = 16 }")
    return rules


def _globs(said: Mapping[str, Any]) -> tuple[str, ...]:
    globs = _typed(said, "modules", list, [])
    if not all(isinstance(glob, str) for glob in globs):
        raise FormatError("modules does not hold names", fix='write modules = ["q_proj", "*.11.*"], for example')
    return tuple(globs)


def _known(said: Mapping[str, Any], fields: tuple[str, ...]) -> None:
    for key in said:
        if key not in fields:
            raise FormatError(f"has an unknown field {key!r:.100}", fix=f"the fields are {', '.join(fields)}")


def _typed(said: Mapping[str, Any], key: str, type_: type, default: Any) -> Any:
    value = said.get(key, default)
    if key in said and type(value) is not type_:
        raise FormatError(f"{key} is of type {type(value).__name__}, not {type_.__name__}", fix=SHAPE)
    return value


def _numbers(said: Any, field: str, *, infinite: bool = False) -> dict[str, float]:
    if not isinstance(said, dict) or any(type(value) not in (int, float) for value in said.values()):
        raise FormatError(f"{field} does not hold names and numbers", fix=SHAPE)
    for name, value in said.items():
        if type(value) is int and abs(value) > float_info.max:
            raise FormatError(f"{field}: {name} is a whole number beyond float64", fix="write a smaller number")
        if not (isfinite(value) or (infinite and abs(value) == inf)):
            raise FormatError(f"{field}: {name} is {value}", fix="write a finite number")
    return dict(said)
