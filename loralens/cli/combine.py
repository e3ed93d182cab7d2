"""``loralens combine``: several adapters as one."""

from pathlib import Path
from typing import Any

import click

from loralens.cli import compress_rule, options
from loralens.cli.combine_recipe import Setting, given_beside, recipe_of, writing


@click.command("combine")
@click.argument("adapters", nargs=-1, metavar="ADAPTER[:W]...")
@click.option(
    "--recipe", type=click.Path(path_type=Path), metavar="FILE", help="Follow a recipe: .toml, or an adapter."
)
@click.option("--method", metavar="NAME", help="How; a wrong name lists all. [default: sum, exact]")
@click.option("--lambda", "lam", type=float, callback=options.finite, metavar="X", help="Strength of the result.")
@click.option("--density", type=float, callback=options.finite, metavar="D", help="Part of the entries that is kept.")
@click.option("--set", "settings", type=Setting(), multiple=True, metavar="NAME=X", help="What else a method is told.")
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Of methods that draw random numbers.")
@click.option("--space", type=click.Choice(["full", "knots", "core"]), help="Where an elementwise method acts.")
@options.MODULES
@click.option("--take", metavar="ADAPTER", help="Whose heads and biases stand where several have some; or none.")
@click.option("--drop-dead", is_flag=True, help="Leave out modules that come out as 0.")
@compress_rule.rules
@click.option("--uniform", is_flag=True, help="One rank everywhere: what LoRAX and mlx-lm want.")
@writing
def command(adapters: tuple[str, ...], recipe: Path | None, **given: Any) -> None:
    """Write several adapters as one: R = method(w·ΔW …), module by module, whatever their ranks and dialects.

    ADAPTER:0.7 counts 0.7 times, ADAPTER:-1 is taken away. The sum is exact, with its true rank; --rank, --energy,
    --size and the others then cut it down, optimally. Names, dialect and layout are the first adapter's. The recipe
    goes into the metadata of OUT, and --recipe OUT follows it again.
    """
    from loralens.cli.combine_run import follow

    if recipe:
        beside = [*given_beside(given), *(["ADAPTER"] if adapters else [])]
        if beside:
            raise click.UsageError(f"{', '.join(beside)} and --recipe exclude each other: the recipe says it all")
        from loralens.formats.records.recipes import read_recipe

        follow(read_recipe(recipe), given)
        return
    if not adapters:
        raise click.UsageError("give at least one ADAPTER, or --recipe")
    follow(recipe_of(adapters, given), given)
