"""``loralens scale``: an adapter at another strength."""

from typing import Any

import click

from loralens.cli import options
from loralens.cli.combine_recipe import strength, writing


@click.command("scale")
@click.argument("adapter")
@click.option("--by", type=float, required=True, callback=options.finite, metavar="X", help="ΔW becomes X·ΔW.")
@options.MODULES
@writing
def command(adapter: str, by: float, modules: tuple[str, ...], **given: Any) -> None:
    """Write ADAPTER with X·ΔW; with --modules only there, the others as they are.

    The factors stay, to the bit: only the scale changes. --by 0 makes zeros.
    """
    from loralens.cli.combine_run import follow
    from loralens.core.recipe import Ingredient, Recipe

    follow(Recipe((Ingredient(adapter, strength(by, modules, 1.0)),)), given)
