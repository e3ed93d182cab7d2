"""The command ``loralens combine``: declares its options, calls the verb and shows the result."""

from typing import Any, get_args

import click

import loralens
from loralens.choices import Space
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


class Setting(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # not generic in click 8.1
    """``NAME=VALUE``, where the value is a number: a setting of a method."""

    name = "setting"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """The name and the number; ``inf`` is a number too."""
        # click may convert a value twice, for example a default.
        if isinstance(value, tuple):
            return value
        name, equals, number = str(value).partition("=")
        try:
            return name.strip(), float(number)
        except ValueError:
            self.fail(f"{value!r} is not NAME=VALUE" if not equals else f"{number!r} is not a number", param, ctx)


@click.command("combine")
@click.argument("adapters", nargs=-1, metavar="ADAPTER[:W]...")
@click.option(
    "--recipe",
    type=options.PATH,
    metavar="FILE",
    help="Follow a recipe: a .toml file, or an adapter that combine has written.",
)
# With a click.Choice the help would show 21 names without explanation. The message for a wrong name explains each.
@click.option(
    "--method", metavar="NAME", help="How the updates are combined; a wrong name lists all methods. [default: sum]"
)
@click.option(
    "--strength",
    "--lambda",
    type=float,
    callback=options.refuse_non_finite,
    metavar="X",
    help="λ, the factor by which the combined update is multiplied.",
)
# No range here: every method has its own, which the verb checks.
@click.option(
    "--density",
    type=float,
    callback=options.refuse_non_finite,
    metavar="D",
    help="The share of the entries that a sparsifying method keeps.",
)
@click.option(
    "--settings",
    "--set",
    type=Setting(),
    multiple=True,
    metavar="NAME=X",
    help="Another setting of the method, by name. Repeatable.",
)
# No default, since a recipe may contain a seed.
@options.seed("random methods", default=None)
@click.option("--space", type=click.Choice(get_args(Space)), help="The space in which an elementwise method works.")
@options.modules
@options.take("several adapters")
@options.DROP_DEAD
@options.rank_rules
@options.UNIFORM
@options.FORCE
@row_options(csv="module")
@options.writing
def command(adapters: tuple[str, ...], rows: RowOptions, **keywords: Any) -> None:
    """Combine several adapters into one: R = method(w·ΔW …), module by module, whatever their ranks and dialects.

    The sum, which is the default, is exact and has its true rank; --rank, --energy, --size and the other rules then
    truncate it optimally. The result has the names, the dialect and the layout of the first adapter. ADAPTER:0.7 has
    the weight 0.7; ADAPTER:-1 is subtracted. The recipe is stored in the metadata of OUT, and --recipe OUT follows it
    again.
    """
    show(loralens.combine(*map(options.split_weight, adapters), **keywords), rows)
