"""`Recipe`: how an adapter was combined from others, as plain data that can be stored and repeated."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from sys import float_info
from typing import Any, Self, final

from loralens.core.names import kind
from loralens.core.naming.clock import Clock
from loralens.core.naming.selection import FEWER_GLOBS, expand_glob, matches, select, wild
from loralens.errors import FormatError, place

FIELDS = ("adapters", "method", "options", "space", "seed", "modules", "take", "drop_dead", "truncate", "uniform")
# The limit of `sys.set_int_max_str_digits`, above which int and str refuse to convert.
PRINTED = 10**4300  # the smallest integer that Python does not convert to text or from text
SHAPE = 'write method = "sum" and, for every adapter, [[adapters]] with path and weight'


@final
@dataclass(frozen=True, slots=True)
class Strength:
    """The weight of an adapter, with other weights for modules that match globs; the last match counts.

    Attributes
    ----------
    modules : mapping of str to float
        Glob over module names or kinds → weight.
    clock : Clock
        The time limit for matching the globs, which may come from a file.
    """

    weight: float = 1.0
    modules: Mapping[str, float] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock, compare=False, repr=False)

    @property
    def plain(self) -> bool:
        """Whether the weight of every module is 1."""
        return self.weight == 1 and not self.modules

    def within(self, names: Mapping[str, object]) -> "Strength":
        """The same weights; a text that is only the beginning of names of these modules is replaced by globs for them.

        Whether a text is a name, a kind or a beginning can only be told from all names.

        Raises
        ------
        OptionError
            A glob matches none of the modules; the message has the nearest names.
        """
        select(names, tuple(self.modules))
        written = {each: weight for glob, weight in self.modules.items() for each in expand_glob(names, glob)}
        return Strength(self.weight, written, self.clock)

    def of(self, name: str) -> float:
        """The weight in the module of this name."""
        last = self.weight
        # Block weights become hundreds of globs, so the kind is found once and not for each glob.
        own = {name, kind(name)}
        with self.clock.running(f"weights for {len(self.modules):,} globs", fix=FEWER_GLOBS):
            # Last match first: later lines of a recipe are exceptions to earlier ones.
            for glob, weight in reversed([*self.modules.items()]):
                if matches(name, glob) if wild(glob) else glob in own:
                    last = weight
                    break
        return float(last)


@final
@dataclass(frozen=True, slots=True)
class Ingredient:
    """An adapter of a recipe: its path or other name, and its weight."""

    path: str
    strength: Strength = Strength()

    def record(self) -> dict[str, Any]:
        """The ingredient as a JSON object."""
        # Most weights are the same in all modules, so an empty table is left out.
        overrides = {"modules": dict(self.strength.modules)} if self.strength.modules else {}
        return {"path": self.path, "weight": self.strength.weight, **overrides}


@final
@dataclass(frozen=True, slots=True)
class Recipe:
    """Adapters, weights, method and truncation of a combination.

    Attributes
    ----------
    options : mapping of str to float
        The options of the method that differ from their defaults.
    modules : tuple of str
        Globs of the modules in the result. Without globs all modules are in it.
    take : str or None
        The path of the adapter whose tensors trained in full are used, or ``none``.
    drop_dead : bool
        Leave out modules whose update is 0.
    truncate : mapping of str to float
        The rule that chooses ranks afterwards, if any: ``rank``, ``energy``, ``size`` …
    uniform : bool
        Give all modules the same rank.
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

    def strengths_of(self, names: Mapping[str, object]) -> list[Strength]:
        """The weights of the adapters, in which texts that begin names of these modules are replaced by globs for them.

        Raises
        ------
        OptionError
            A glob matches none of these modules; the message has the nearest names.
        """
        return [ingredient.strength.within(names) for ingredient in self.adapters]

    def record(self) -> dict[str, Any]:
        """The recipe as a JSON object without fields that have their default value."""
        values = {name: getattr(self, name) for name in FIELDS if name != "adapters"}
        # Plain types of JSON; the fields of a recipe may be tuples and read-only mappings.
        values |= {"options": dict(self.options), "modules": list(self.modules), "truncate": dict(self.truncate)}
        # Fields with their default value are left out; the method is always stated.
        stated = {key: value for key, value in values.items() if value or key == "method"}
        return {**stated, "adapters": [ingredient.record() for ingredient in self.adapters]}

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Self:
        """Read a recipe from a JSON or TOML object.

        Raises
        ------
        FormatError
            A field is unknown or has the wrong type, there are no adapters, a number is NaN or beyond float64, or the
            seed is negative. Only an option may be infinite.
        """
        _check_fields(table, FIELDS)
        adapters = table.get("adapters")
        if not isinstance(adapters, list) or not adapters:
            raise FormatError("names no adapters", fix=SHAPE)
        ingredients = tuple(map(_parse_ingredient, adapters))
        modules = _read_typed(table, "modules", list, [])
        if not all(isinstance(glob, str) for glob in modules):
            raise FormatError("modules is not a list of names", fix='write modules = ["q_proj", "*.11.*"], for example')
        rules = _read_numbers(table.get("truncate", {}), "truncate")
        # Two rules could contradict each other.
        if len(rules) > 1:
            raise FormatError(f"truncate has {len(rules)} rules", fix="write one, for example truncate = { rank = 16 }")
        return cls(
            ingredients,
            method=_read_typed(table, "method", str, "sum"),
            options=_read_numbers(table.get("options", {}), "options", infinite=True),
            space=_read_typed(table, "space", str, None),
            seed=_read_seed(table),
            modules=tuple(modules),
            take=_read_typed(table, "take", str, None),
            drop_dead=_read_typed(table, "drop_dead", bool, default=False),
            truncate=rules,
            uniform=_read_typed(table, "uniform", bool, default=False),
        )


def _parse_ingredient(table: Any) -> Ingredient:
    if not isinstance(table, dict):
        raise FormatError("an entry of adapters is not a table", fix=SHAPE)
    _check_fields(table, ("path", "weight", "modules"))
    path = _read_typed(table, "path", str, "")
    if not path:
        raise FormatError("an entry of adapters has no path", fix=SHAPE)
    with place(path):
        weights = _read_numbers({"weight": table.get("weight", 1.0)}, "adapters")
        modules = _read_numbers(table.get("modules", {}), "adapters.modules")
    return Ingredient(path, Strength(weights["weight"], modules))


def _read_seed(table: Mapping[str, Any]) -> int:
    seed: int = _read_typed(table, "seed", int, 0)
    # A longer number could be read from TOML, but not be written down again.
    if not 0 <= seed < PRINTED:
        what = f"is {seed}" if seed < 0 else "has more digits than Python reads and writes"
        raise FormatError(f"seed {what}", fix="write a whole number of 0 or more")
    return seed


def _check_fields(table: Mapping[str, Any], fields: tuple[str, ...]) -> None:
    for key in table:
        if key not in fields:
            raise FormatError(f"has an unknown field {key!r:.100}", fix=f"the fields are {', '.join(fields)}")


def _read_typed(table: Mapping[str, Any], key: str, type_: type, default: Any) -> Any:
    value = table.get(key, default)
    # `type`, not isinstance: True is an int in Python.
    if key in table and type(value) is not type_:
        raise FormatError(f"{key} is of type {type(value).__name__}, not {type_.__name__}", fix=SHAPE)
    return value


def _read_numbers(table: Any, field: str, *, infinite: bool = False) -> dict[str, float]:
    if not isinstance(table, dict) or any(type(value) not in (int, float) for value in table.values()):
        raise FormatError(f"{field} is not a table of names and numbers", fix=SHAPE)
    for name, value in table.items():
        # float() of such a number would raise OverflowError later.
        if type(value) is int and abs(value) > float_info.max:
            raise FormatError(f"{field}: {name} is a whole number beyond float64", fix="write a smaller number")
        if not (isfinite(value) or (infinite and abs(value) == inf)):
            raise FormatError(f"{field}: {name} is {value}", fix="write a finite number")
    return dict(table)
