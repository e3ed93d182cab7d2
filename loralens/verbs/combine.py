"""The verb ``combine``: makes one adapter of several, by the exact sum or by a method of the literature."""

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
from loralens.verbs.inputs.choices import as_globs, check_choice, check_finite
from loralens.verbs.inputs.weighted import WithStrength, ingredients, label_of_taken, sources_with_strengths
from loralens.verbs.outputs.combine_result import CombineResult
from loralens.verbs.outputs.combine_run import follow
from loralens.verbs.outputs.rules import option_names, optional_rule
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
    """Combine several adapters into one: R = method(w·ΔW …), module by module, whatever their ranks and dialects.

    The sum, which is the default, is exact and has its true rank; ``rank``, ``energy``, ``size`` and the other rules
    then truncate it optimally. The result has the names, the dialect and the layout of the first adapter. The recipe is
    stored in the metadata of the file, and ``combine(recipe=file)`` follows it again.

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
        λ, the factor by which the combined update is multiplied; the default depends on the method and is mostly 1.
    density : float, optional
        The share of the entries that a sparsifying method keeps, in (0, 1].
    settings : mapping of str to float, or pairs
        Other options of the method: ``{"mu": 1.5}``.
    seed : int, optional
        Seed of the random numbers for methods that draw at random; by default 0.
    space : str, optional
        The space in which an elementwise method works: ``full``, ``knots`` or ``core``.
    modules : sequence of str
        Only modules whose name or kind matches one of these glob patterns.
    take : path or Adapter, optional
        The adapter whose heads and biases are written where several adapters have some: its path, its name, its number
        from ``"1"``, or the object that was given; ``"none"`` leaves them out.
    drop_dead : bool
        Leave out modules whose update is zero.
    rank, energy, error, sv_ratio, parameters, size
        How ranks are chosen afterwards, at most one of them: see `loralens.compress`.
    uniform : bool
        Give all modules the same rank, padded with zeros, as LoRAX and mlx-lm require.
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
        modules=as_globs(modules),
        take=label_of_taken(take, pairs),
        drop_dead=drop_dead,
        truncate=_rule_of(rules),
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
    names = [option_names(name) for name, value in excluded.items() if value is not None]
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


def _rule_of(rules: Mapping[str, Any]) -> dict[str, float]:
    """The rule by which ranks are chosen afterwards, with its value; empty where none is given."""
    rule = optional_rule(**rules)
    if rule is None:
        return {}
    value = next(value for value in rules.values() if value is not None)
    return {rule.name: int(rule.value) if rule.name in ("rank", "bytes") else float(value)}
