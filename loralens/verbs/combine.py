"""The verb ``combine``: makes one adapter from several, by the exact sum or by a method of the literature."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

from loralens.arithmetic.method import SPACES
from loralens.choices import Space
from loralens.core.recipe import Recipe
from loralens.errors import OptionError
from loralens.formats.records.recipes import read_recipe
from loralens.verbs.inputs.adapters import AdapterSource
from loralens.verbs.inputs.choices import Blocks, as_globs, check_choice, check_finite
from loralens.verbs.inputs.weighted import WithStrength, ingredients, label_of_taken, sources_with_strengths
from loralens.verbs.outputs.combine_result import CombineResult
from loralens.verbs.outputs.combine_run import follow_recipe
from loralens.verbs.outputs.rules import option_names, optional_rule, split_rules
from loralens.verbs.outputs.writing import RulesWritingAndReading


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
    block: Blocks = (),
    take: AdapterSource | None = None,
    drop_dead: bool = False,
    uniform: bool = False,
    force: bool = False,
    **options: Unpack[RulesWritingAndReading],
) -> CombineResult:
    """Combine several adapters into one: R = method(w·ΔW …), module by module, whatever their ranks and dialects.

    The sum R = Σ w·ΔW, which is the default, is exact and has its true rank; ``rank``, ``energy``, ``size`` and the
    other rules then truncate it optimally. Its cost is O((out + in)·ρ²) per module, with ρ = Σr: no ΔW is formed. Only
    elementwise methods in the space ``full`` form ΔW, in blocks of rows. The result has the names, the dialect and the
    layout of the first adapter. The recipe is stored in the metadata of the file, and ``combine(recipe=file)`` follows
    it again.

    Parameters
    ----------
    *adapters : path, Adapter, (adapter, weight), or a sequence or mapping of them
        ``combine("a", ("b", 0.5))``, ``combine([a, b])``, ``combine({"a": 0.5, "b": 0.5})``. A weight is a number of
        any sign, 1 by default, or a mapping of globs over modules to numbers, of which the last match counts:
        ``("b", {"v_proj": 0.3})``.
    recipe : path or Recipe, optional
        Follow a recipe: a TOML file, an adapter that was combined, or the ``recipe`` of a result. It replaces the
        adapters and all options except those of writing and reading.
    method : str, optional
        A name in `loralens.arithmetic.methods.METHODS`; by default ``sum``, which is exact.
    strength : float, optional
        λ, the factor by which the combined update is multiplied; the default depends on the method and is mostly 1.
    density : float, optional
        The share of the entries that a sparsifying method keeps, in (0, 1].
    settings : mapping of str to float, or pairs
        Other options of the method, such as ``{"mu": 1.5}``. A wrong name lists those that the method has.
    seed : int, optional
        Seed of the random numbers for random methods; by default 0.
    space : str, optional
        The space in which an elementwise method works: ``full``, ``knots`` or ``core``.
    modules : sequence of str
        Only modules whose name or kind matches one of these glob patterns.
    block : int, str or sequence of them
        Only modules in these blocks: ``3``, ``"4-8"``, or ``"IN04"`` of an image model.
    take : path or Adapter, optional
        The adapter whose heads and biases are written if several adapters have some: its path, its name, its number
        from ``"1"``, or the object that was given; ``"none"`` leaves them out.
    drop_dead : bool
        Leave out modules whose update is zero.
    uniform : bool
        Give all modules the same rank, padded with zeros, as LoRAX and mlx-lm require.
    force : bool
        Combine adapters of different image models too, such as SDXL and SD 1.5, which share a text encoder.
    **options : RankRules, Writing and Reading
        How the result is truncated (at most one of ``rank``, ``energy``, ``error``, ``sv_ratio``, ``parameters`` and
        ``size``; see `loralens.compress`), how it is written (``output``, ``to``, ``base``, ``dtype``, ``allow_loss``,
        ``overwrite``, ``dry_run``), and how files are read (``format``, ``alpha``, ``scale``, ``once``).

    Raises
    ------
    OptionError
        The method is unknown or has no such option, there is no adapter, a weight is not a finite number, a recipe and
        other options or several rules were given, a glob pattern matches no module, or no module is left.
    FormatError
        A file is not an adapter, or not a recipe.
    MismatchError
        The adapters are of different image models or have no module in common, or something cannot be combined, such
        as DoRA without its base or the heads of several adapters without ``take``.
    ShapeError
        A module has two shapes, so the adapters belong to two base models.
    """
    rules, files = split_rules(options)
    if recipe is not None:
        # All that a recipe states itself. A value of 0 was given by the user; None, () and False are defaults.
        excluded = {
            "strength": strength, "density": density, "settings": settings or None, "method": method, "space": space,
            "seed": seed, "modules": modules or None, "take": take, "drop_dead": drop_dead or None,
            "uniform": uniform or None, **rules,
        }  # fmt: skip
        stored = _read_recipe(recipe, adapters, excluded)
        return follow_recipe(stored, [ingredient.path for ingredient in stored.adapters], force=force, **files)
    # Refused before anything is read.
    check_choice("space", space, SPACES)
    if strength is not None:
        check_finite("strength", strength)
    # NumPy's SeedSequence, which gives every module its random numbers, accepts no other seeds.
    if seed is not None and (not isinstance(seed, int) or seed < 0):
        raise OptionError(f"seed {seed!r} is not possible", fix="give a whole number of 0 or more")
    if not adapters:
        raise OptionError("no adapter is given", fix="give at least one ADAPTER, or --recipe")
    pairs = sources_with_strengths(adapters)
    rule = optional_rule(**rules)
    combination = Recipe(
        ingredients(pairs),
        # On held-out tasks thirteen of eighteen methods could not be told apart, and the exact sum, which needs no
        # setting, is one of them (docs/combine.md).
        method=method or "sum",
        options=_method_options(strength, density, settings),
        space=space,
        seed=seed or 0,
        modules=as_globs(modules, block),
        take=label_of_taken(take, pairs),
        drop_dead=drop_dead,
        truncate={} if rule is None else {rule.name: rule.value},
        uniform=uniform,
    )
    return follow_recipe(combination, [source for source, _ in pairs], force=force, **files)


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
