"""`Recipe`: how an adapter was combined from others, as plain data that can be stored and repeated."""

import json
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from sys import float_info
from typing import Any, Self, final

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array
from loralens.core.names import kind, natural_key, nearest
from loralens.core.selection import expand_glob, matches, select, wild
from loralens.errors import FormatError, MismatchError, OptionError, place

# Far more than any file of the field has, and few enough for every function that calls itself for the parts of a value,
# such as `copy.deepcopy`, which Python stops after 1,000 calls.
DEEPEST = 64
_TOO_DEEP = f"nested more than {DEEPEST} levels deep"


def parse_json(
    text: str | bytes, *, object_pairs_hook: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None
) -> Any:
    """The value of a JSON text; ``object_pairs_hook`` is that of `json.loads`.

    Raises
    ------
    ValueError
        The text is not JSON, or it is nested more than `DEEPEST` levels deep.
    """
    try:
        value = json.loads(text, object_pairs_hook=object_pairs_hook)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    level: list[Any] = [[value]]
    # Level by level, because the check must not call itself either. `type`, because it is faster than isinstance, and
    # the header of a large file has a million values.
    for _ in range(DEEPEST + 1):
        level = [
            part
            for item in level
            for part in (item if type(item) is list else item.values())
            if type(part) is list or type(part) is dict
        ]
        if not level:
            return value
    raise ValueError(_TOO_DEEP)


@final
@dataclass(frozen=True, slots=True)
class Moment:
    """Second moments of one module of rank r over real inputs x, uncentred.

    Attributes
    ----------
    K : float64 array (r, r)
        E[z zᵀ] with z = A x. It is symmetric and, apart from rounding, positive semidefinite. x is the input of the
        module in the adapted model.
    count : int
        Number of inputs x. If it is 0, no input reached the module, and K is 0.
    G : float64 array (r, r), or None
        E[(Bᵀg)(Bᵀg)ᵀ], where g = ∂loss/∂y at the output y of the module; None if it was not requested.
    trace : float or None
        tr E[x xᵀ] = E‖x‖², which includes the part of x that z does not depend on. None if it was not measured.
    """

    K: Array
    count: int
    G: Array | None = None
    trace: float | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Module name → `Moment`, in natural order, and the fingerprint of their adapter.

    Attributes
    ----------
    fingerprint : str
        The `loralens.core.fingerprint` of the adapter.
    unmeasured : mapping of str to str
        Modules of the adapter without a moment → the reason.
    source : mapping of str to object
        The source of the inputs, as JSON: the number of batches, and fields that the caller adds.
    """

    modules: Mapping[str, Moment]
    fingerprint: str
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("modules", "unmeasured"):
            values: Mapping[str, Any] = getattr(self, name)
            object.__setattr__(self, name, {key: values[key] for key in sorted(values, key=natural_key)})

    def __getitem__(self, name: str) -> Moment:
        if name not in self.modules:
            why = self.unmeasured.get(name)
            # A module that could not be measured gets its reason; any other name is probably misspelled.
            what = f"no moments of {name}" + (f": {why}" if why else "")
            raise OptionError(what, fix=f"the nearest names are {nearest(name, self.modules)}")
        return self.modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __contains__(self, name: object) -> bool:
        return name in self.modules

    def items(self) -> ItemsView[str, Moment]:
        """Pairs of name and moment, in natural order."""
        return self.modules.items()

    @property
    def unreached(self) -> tuple[str, ...]:
        """Modules that could be measured but that no input reached."""
        return tuple(name for name, moment in self.items() if not moment.count)

    def check(self, adapter: Adapter) -> None:
        """Check that these moments were measured with this adapter.

        Raises
        ------
        MismatchError
            The names, shapes or factors differ from those of the adapter at calibration.
        """
        # K and G are those of these factors: the same update with other factors has other moments.
        # Imported here because hashlib loads OpenSSL, and most commands import this module without moments.
        from loralens.core.fingerprint import fingerprint

        if fingerprint(adapter) != self.fingerprint:
            turned = any(module.layout.rows for module in adapter.modules.values())
            raise MismatchError(
                "these moments belong to another adapter: names, shapes or factors differ",
                fix="give --base, the model in which the adapter was calibrated: its rows are then put in order"
                if turned
                else "measure them again with this one: loralens calibrate",
            )


FIELDS = ("adapters", "method", "options", "space", "seed", "modules", "take", "drop_dead", "truncate", "uniform")
TYPES = {"modules": list, "method": str, "space": str, "seed": int, "take": str, "drop_dead": bool, "uniform": bool}
SHAPE = 'write method = "sum" and, for every adapter, [[adapters]] with path and weight'


@final
@dataclass(frozen=True, slots=True)
class Strength:
    """The weight of an adapter, with other weights for modules that match globs; the last match counts.

    Attributes
    ----------
    modules : mapping of str to float
        Glob over module names or kinds → weight.
    """

    weight: float = 1.0
    modules: Mapping[str, float] = field(default_factory=dict)

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
        # Weights of blocks name every module, and each name need not be compared with all others.
        known = {*names, *map(kind, names)}
        written = {
            each: weight
            for glob, weight in self.modules.items()
            for each in ([glob] if glob in known else expand_glob(names, glob))
        }
        return Strength(self.weight, written)

    def of(self, name: str) -> float:
        """The weight in the module of this name."""
        return self.by_module([name])[name]

    def by_module(self, names: Iterable[str]) -> dict[str, float]:
        """The weights in the modules of these names."""
        # Weights of blocks name every module, so only globs with wildcards are compared with all names.
        places = {glob: place for place, glob in enumerate(self.modules)}
        patterns = [glob for glob in self.modules if wild(glob)]
        weights = [float(weight) for weight in self.modules.values()] + [float(self.weight)]

        def place(name: str) -> int:
            matching = [glob for glob in patterns if matches(name, glob)]
            # The last match counts: later lines of a recipe are exceptions to earlier ones.
            return max((places[each] for each in (name, kind(name), *matching) if each in places), default=-1)

        return {name: weights[place(name)] for name in names}


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
        The rule that chooses ranks afterwards, if any: ``rank``, ``energy``, ``bytes`` … Beside another rule, ``rank``
        is its ceiling.
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
        stated = {key: _read_typed(table, key, kind) for key, kind in TYPES.items() if key in table}
        if not all(isinstance(glob, str) for glob in stated.get("modules", [])):
            raise FormatError("modules is not a list of names", fix='write modules = ["q_proj", "*.11.*"], for example')
        stated["modules"] = tuple(stated.get("modules", ()))
        if stated.get("seed", 0) < 0:
            raise FormatError(f"seed is {stated['seed']}", fix="write a whole number of 0 or more")
        rules = _read_numbers(table.get("truncate", {}), "truncate")
        # Two rules could contradict each other. A rank beside another rule is a ceiling.
        if len(rules.keys() - {"rank"}) > 1:
            raise FormatError(f"truncate has {len(rules)} rules", fix="write one, for example truncate = { rank = 16 }")
        options = _read_numbers(table.get("options", {}), "options", infinite=True)
        return cls(ingredients, options=options, truncate=rules, **stated)


def _parse_ingredient(table: Any) -> Ingredient:
    if not isinstance(table, dict):
        raise FormatError("an entry of adapters is not a table", fix=SHAPE)
    _check_fields(table, ("path", "weight", "modules"))
    path = _read_typed(table, "path", str) if "path" in table else ""
    if not path:
        raise FormatError("an entry of adapters has no path", fix=SHAPE)
    with place(path):
        weights = _read_numbers({"weight": table.get("weight", 1.0)}, "adapters")
        modules = _read_numbers(table.get("modules", {}), "adapters.modules")
    return Ingredient(path, Strength(weights["weight"], modules))


def _check_fields(table: Mapping[str, Any], fields: tuple[str, ...]) -> None:
    for key in table:
        if key not in fields:
            raise FormatError(f"has an unknown field {key!r:.100}", fix=f"the fields are {', '.join(fields)}")


def _read_typed(table: Mapping[str, Any], key: str, type_: type) -> Any:
    value = table[key]
    # `type`, not isinstance: True is an int in Python.
    if type(value) is not type_:
        raise FormatError(f"{key} is of type {type(value).__name__}, not {type_.__name__}", fix=SHAPE)
    return value


def _read_numbers(table: Any, field: str, *, infinite: bool = False) -> dict[str, float]:
    if not isinstance(table, dict) or any(type(value) not in (int, float) for value in table.values()):
        raise FormatError(f"{field} is not a table of names and numbers", fix=SHAPE)
    for name, value in table.items():
        # A whole number beyond float64 cannot be one.
        if not -float_info.max <= value <= float_info.max and not (infinite and value in (inf, -inf)):
            raise FormatError(f"{field}: {name} is not a finite number", fix="write a finite number")
    return dict(table)


RECORD = "loralens_training"  # key of the metadata


@final
@dataclass(frozen=True, slots=True, eq=False)
class State:
    """The state of a training run between two steps.

    Attributes
    ----------
    step : int
        Number of steps that are done.
    tensors : mapping of str to array
        Trained tensors, the state of the optimiser, and the best tensors so far, in their own dtypes.
    record : mapping
        All other values of the state, as JSON.
    run : mapping
        The identity of the run, as JSON (see `loralens.training.state.run_identity`).
    """

    step: int
    tensors: Mapping[str, Array]
    record: Mapping[str, Any]
    run: Mapping[str, Any] = field(default_factory=dict)


def record_of(adapter: Adapter) -> Mapping[str, Any] | None:
    """The record of a training by loralens in the metadata of an adapter; None if there is none, or it is not JSON.

    ``A0`` is a digest of the initial factors A of all modules, and ``A0_of`` has a digest for each module. Equal
    digests mean equal numbers. See `loralens.training.injection.Injection` for the other fields.
    """
    try:
        record = parse_json((adapter.metadata or {}).get(RECORD, "null"))
    # Metadata of a file may hold anything.
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def same_start(first: Adapter, second: Adapter) -> bool:
    """Whether two adapters were trained from the same A₀ according to their records; False without a record."""
    starts = [(record_of(adapter) or {}).get("A0") for adapter in (first, second)]
    # Two adapters without a digest agree in nothing that is known.
    return starts[0] is not None and starts[0] == starts[1]
