"""``loralens interpolate``: a point on the line between two adapters."""

from typing import Any

import click

from loralens.cli import options
from loralens.cli.combine_recipe import strength, writing


@click.command("interpolate")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--at", type=float, required=True, callback=options.finite, metavar="T", help="0 is A, 1 is B.")
@options.MODULES
@click.option("--take", metavar="ADAPTER", help="Whose heads and biases stand where both have some; or none.")
@writing
def command(first: str, second: str, at: float, modules: tuple[str, ...], take: str | None, **given: Any) -> None:
    """Write (1 − T)·A + T·B, exact; with --modules only there, and A elsewhere.

    T may lie outside [0, 1]. Along the arc instead of the line: loralens combine --method slerp.
    """
    from loralens.cli.combine_run import follow
    from loralens.core.recipe import Ingredient, Recipe

    pair = Ingredient(first, strength(1 - at, modules, 1.0)), Ingredient(second, strength(at, modules, 0.0))
    follow(Recipe(pair, take=take), given)
