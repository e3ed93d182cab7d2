"""The command ``loralens scale``: declares its options, calls the verb and shows the result."""

from typing import Any

import click

import loralens
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


@click.command("scale")
@click.argument("adapter")
@click.option(
    "--by",
    type=float,
    callback=options.refuse_non_finite,
    metavar="X",
    help="The factor that multiplies ΔW. [default with weights of blocks: 1]",
)
@options.modules
@options.blocks
@row_options(csv="module")
@options.writing
def command(adapter: str, by: float | None, rows: RowOptions, **keywords: Any) -> None:
    """Write an adapter with ΔW multiplied by a number.

    With --modules only these modules change. The factors keep their bits: only the scale changes. With --by 0 every ΔW
    is zero. With --preset or --block-weights, each block of an image model has its own weight, which --by multiplies.
    """
    show(loralens.scale(adapter, by, **keywords), rows)
