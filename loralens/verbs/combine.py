"""``combine``: several adapters as one, by the exact sum or by a method of the literature."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

from loralens.arithmetic.method import SPACES, Space
from loralens.core.recipe import Recipe
from loralens.errors import OptionError
from loralens.formats.records.recipes import read_recipe
from loralens.verbs.inputs.adapters import AdapterSource
from loralens.verbs.inputs.choices import check_choice, check_finite, module_globs
from loralens.verbs.inputs.weighted import WithStrength, ingredients, label_of_taken, sources_with_strengths
from loralens.verbs.outputs.combine_result import CombineResult
from loralens.verbs.outputs.combine_run import follow
from loralens.verbs.outputs.rules import optional_rule, spoken
from loralens.verbs.outputs.writing import WritingAndReading


def combine(
    *adapters: WithStrength,
    recipe: str | PathLike[str] | Recipe | None = None,
    method: str | None = None,
    strength: float | None = None,
    density: float | None = None,
    settings: Mapping[str, float] | Iterable[tuple[str, float]] = (),
    seed: int | None = None,
    space: Space | None = None,
    modules: Sequence[str] = (),
    take: AdapterSource | None = None,
    drop_dead: bool = False,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    sv_ratio: float | None = None,
    parameters: float | None = None,
    size: int | str | None = None,
    uniform: bool = False,
    **options: Unpack[WritingAndReading],
) -> CombineResult:
    """Several adapters as one: R = method(w·ΔW …), module by module, whatever their ranks and dialects.

    The sum is exact, with its true rank; ``rank``, ``energy``, ``size`` and the others then truncate it, optimally.
    Names, dialect and layout are those of the first adapter. The recipe goes into the metadata of the file, and
    ``combine(recipe=file)`` follows it again.

    Parameters
    ----------
    *adapters : path, Adapter, (adapter, weight), or a sequence or mapping of them
        ``combine("a", ("b", 0.5))``, ``combine([a, b])``, ``combine({"a": 0.5, "b": 0.5})``. A weight is a number of
        any sign, 1 by default, or a mapping of globs over modules to numbers, of which the last match counts:
        ``("b", {"v_proj": 0.3})``.
    recipe : path or Recipe, optional
        Follow a recipe: a TOML file, an adapter that was combined, or the ``recipe`` of a result. It takes the place of
        the adapters and of all options but those of writing and reading.
    method : str, optional
        A name in `loralens.arithmetic.methods.METHODS`; by default ``sum``, which is exact.
    strength : float, optional
        λ, the strength of the result; as the method has it, mostly 1.
    density : float, optional
        The part of the entries that an elementwise method keeps, in (0, 1].
    settings : mapping of str to float, or pairs
        Other options of the method: ``{"mu": 1.5}``.
    seed : int, optional
        Of methods that draw random numbers; 0 by default.
    space : str, optional
        Where an elementwise method acts: ``full``, ``knots`` or ``core``.
    modules : sequence of str
        Only these: globs over names or kinds.
    take : path or Adapter, optional
        Whose heads and biases stand where several adapters have some: its path, its name, its number from ``"1"``, or
        the object that was given; ``"none"`` leaves them out.
    drop_dead : bool
        Leave out modules that come out as 0.
    rank, energy, error, sv_ratio, parameters, size
        How ranks are chosen afterwards, at most one of them: see `loralens.compress`.
    uniform : bool
        One rank everywhere, which LoRAX and mlx-lm need.
    **options : Writing and Reading
        How the result is written (``output``, ``to``, ``base``, ``dtype``, ``allow_loss``, ``overwrite``, ``dry_run``)
        and how files are read (``format``, ``alpha``, ``scale``, ``allow_pickle``, ``once``).

    Raises
    ------
    OptionError
        An unknown method, or an option that it does not have; no adapter; a weight that is no finite number; a recipe
        and other options; several rules of ranks; a glob that matches nothing; nothing left.
    FormatError
        A file that is no adapter, or no recipe.
    MismatchError
        No module in common; what cannot be combined, such as DoRA without its base, or heads in several adapters
        without ``take``.
    ShapeError
        A module of two shapes: two base models.
    """
    rules = {
        "rank": rank, "energy": energy, "error": error, "sv_ratio": sv_ratio, "parameters": parameters, "size": size,
    }  # fmt: skip
    if recipe is not None:
        excluded = {
            "strength": strength, "density": density, "settings": settings or None, "method": method, "space": space,
            "seed": seed, "modules": modules or None, "take": take, "drop_dead": drop_dead or None,
            "uniform": uniform or None, **rules,
        }  # fmt: skip
        return _follow_recipe(recipe, adapters, excluded, options)
    check_choice("space", space, SPACES)
    if strength is not None:
        check_finite("strength", strength)
    if seed is not None and (not isinstance(seed, int) or seed < 0):
        raise OptionError(f"seed {seed!r} is not possible", fix="give a whole number from 0")
    if not adapters:
        raise OptionError("there is no adapter", fix="give at least one ADAPTER, or --recipe")
    pairs = sources_with_strengths(adapters)
    written = Recipe(
        ingredients(pairs),
        method=method or "sum",
        options=_method_options(strength, density, settings),
        space=space,
        seed=seed or 0,
        modules=module_globs(modules),
        take=label_of_taken(take, pairs),
        drop_dead=drop_dead,
        truncate=_truncation(rules),
        uniform=uniform,
    )
    return follow(written, [source for source, _ in pairs], **options)


def _follow_recipe(
    recipe: str | PathLike[str] | Recipe,
    adapters: Sequence[WithStrength],
    excluded: Mapping[str, Any],
    options: WritingAndReading,
) -> CombineResult:
    """Follow a recipe, which has its own of all the options in ``excluded``. A 0 was given, None was not."""
    names = [spoken(name) for name, value in excluded.items() if value is not None]
    names += ["ADAPTER"] if adapters else []
    if names:
        raise OptionError(
            f"{', '.join(names)} and --recipe exclude each other: the recipe says it all",
            fix=f"leave out --recipe, or {', '.join(names)}",
        )
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(Path(recipe))
    return follow(recipe, [ingredient.path for ingredient in recipe.adapters], **options)


def _method_options(
    strength: float | None, density: float | None, settings: Mapping[str, float] | Iterable[tuple[str, float]]
) -> dict[str, float]:
    """Options of the method that were given; the method itself says which it has, and from where to where."""
    try:
        options = {"lam": strength, "density": density, **dict(settings)}
    except (TypeError, ValueError) as error:
        raise OptionError(f"settings {settings!r} are no names and numbers", fix='give {"mu": 1.5}') from error
    for name, value in options.items():
        if value is not None and not isinstance(value, Real):
            raise OptionError(f"{name} {value!r} is no number", fix="give a number")
    return {name: float(value) for name, value in options.items() if value is not None}


def _truncation(rules: Mapping[str, Any]) -> dict[str, float]:
    """The rule by which ranks are chosen afterwards, with its value; empty where none is given."""
    rule = optional_rule(**rules)
    if rule is None:
        return {}
    value = next(value for value in rules.values() if value is not None)
    return {rule.name: int(rule.value) if rule.name in ("rank", "bytes") else float(value)}
