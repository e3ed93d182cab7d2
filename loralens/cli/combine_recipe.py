"""From a command line to a recipe: weights, method, options, truncation; shared with the short forms."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from loralens.cli import compress_rule, options, rounding
from loralens.cli.convert import TARGETS

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.core.recipe import Recipe, Strength

F = TypeVar("F", bound=Callable[..., Any])

_WRITING = (
    click.option("-o", "--output", type=click.Path(path_type=Path), metavar="OUT", help="File or folder to write."),
    click.option("--to", type=click.Choice(TARGETS), help="The dialect to write. [default: the first adapter's own]"),
    click.option("--base", metavar="MODEL", help=f"{options.BASE_HELP} For DoRA, and for GGUF."),
    click.option("--dtype", type=click.Choice(list(options.DTYPES)), help="Of all factors. [default: theirs]"),
    rounding.ALLOW_LOSS,
    click.option("--overwrite", is_flag=True, help="Replace OUT."),
    click.option("--dry-run", is_flag=True, help="Report, and write nothing."),
    click.option("--json", "as_json", is_flag=True, help="Machine-readable report."),
)


def writing(function: F) -> F:
    """The options of every command that writes a combined adapter, and of reading the others."""
    function = options.reading(function)
    for option in reversed(_WRITING):
        function = option(function)
    return function


class Setting(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # not generic in click 8.1
    """``NAME=VALUE``: a number that a method is told."""

    name = "setting"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """Its name and number; ``inf`` is one."""
        if isinstance(value, tuple):
            return value
        name, equals, number = str(value).partition("=")
        try:
            return name.strip(), float(number)
        except ValueError:
            self.fail(f"{value!r} is not NAME=VALUE" if not equals else f"{number!r} is no number", param, ctx)


def recipe_of(adapters: Sequence[str], given: Mapping[str, Any]) -> "Recipe":
    """The recipe that the options of ``loralens combine`` say."""
    from loralens.core.recipe import Ingredient, Recipe, Strength

    told = {"lam": given["lam"], "density": given["density"], **dict(given["settings"])}
    return Recipe(
        tuple(Ingredient(path, Strength(weight)) for path, weight in map(options.weighted, adapters)),
        method=given["method"] or "sum",
        options={name: value for name, value in told.items() if value is not None},
        space=given["space"],
        seed=given["seed"] or 0,
        modules=tuple(given["modules"]),
        take=given["take"],
        drop_dead=given["drop_dead"],
        truncate=truncation(given),
        uniform=given["uniform"],
    )


def truncation(given: Mapping[str, Any]) -> dict[str, float]:
    """The rule by which ranks are chosen afterwards, with its value; empty where none is given.

    Raises
    ------
    click.UsageError
        Several rules, or a value that is not finite.
    """
    said = compress_rule.rules_given(given)
    if len(said) > 1:
        raise click.UsageError(f"{compress_rule.spoken(*said)} exclude each other: give one of them")
    return {compress_rule.NAMES[name]: value for name, value in said.items()}


def given_beside(given: Mapping[str, Any]) -> list[str]:
    """Options that a recipe has its own of, as far as they were given, as a user types them. A 0 was given."""
    names = ("lam", "density", "settings", "method", "space", "seed", "modules", "take", "drop_dead", "uniform")
    typed = {"lam": "lambda", "settings": "set"}
    said = [name for name in names if given[name] not in (None, ()) and given[name] is not False]
    return [compress_rule.spoken(typed.get(name, name)) for name in (*said, *compress_rule.rules_given(given))]


def strength(weight: float, modules: Sequence[str], elsewhere: float) -> "Strength":
    """``weight`` everywhere; or only in the modules of these globs, and ``elsewhere`` in the others."""
    from loralens.core.recipe import Strength

    return Strength(elsewhere, dict.fromkeys(modules, weight)) if modules else Strength(weight)
