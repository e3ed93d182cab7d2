"""``loralens subtract``: one adapter less another."""

from typing import Any

import click

from loralens.cli import options
from loralens.cli.combine_recipe import strength, writing


@click.command("subtract")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@options.MODULES
@click.option("--take", metavar="ADAPTER", help="Whose heads and biases stand where both have some; or none.")
@click.option("--drop-dead", is_flag=True, help="Leave out modules that come out as 0.")
@writing
def command(first: str, second: str, modules: tuple[str, ...], take: str | None, drop_dead: bool, **given: Any) -> None:
    """Write A − B, exact; with --modules B is taken away only there.

    What is equal in both comes out as exact zeros.
    """
    from loralens.cli.combine_run import follow
    from loralens.core.recipe import Ingredient, Recipe

    pair = Ingredient(first), Ingredient(second, strength(-1.0, modules, 0.0))
    follow(Recipe(pair, take=take, drop_dead=drop_dead), given)
