"""The command ``loralens interpolate``: declares its options, calls the verb and shows the result."""

from typing import Any

import click

import loralens
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


@click.command("interpolate")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
# No range: beyond 0 and 1 the line goes on, and the result is exact there too.
@click.option(
    "--at",
    type=float,
    required=True,
    callback=options.refuse_non_finite,
    metavar="T",
    help="The place on the line between the adapters: 0 is A, 1 is B.",
)
@options.modules
@options.take("both")
@options.FORCE
@row_options(csv="module")
@options.writing
def command(first: str, second: str, at: float, rows: RowOptions, **keywords: Any) -> None:
    """Write (1 − t)·A + t·B of two adapters, exactly.

    With --modules only these modules are interpolated, and the others are those of A. The number t may lie outside [0,
    1]. For the arc instead of the line: loralens combine --method slerp.
    """
    show(loralens.interpolate(first, second, at, **keywords), rows)
