"""``loralens negate``: an adapter with its sign changed."""

from typing import Any

import click

from loralens.cli import options
from loralens.cli.combine_recipe import strength, writing


@click.command("negate")
@click.argument("adapter")
@options.MODULES
@writing
def command(adapter: str, modules: tuple[str, ...], **given: Any) -> None:
    """Write ADAPTER with the sign of ΔW changed; with --modules only there, the others as they are.

    The factors stay, to the bit: the scale changes its sign.
    """
    from loralens.cli.combine_run import follow
    from loralens.core.recipe import Ingredient, Recipe

    follow(Recipe((Ingredient(adapter, strength(-1.0, modules, 1.0)),)), given)
