"""``loralens scale``: options in, the verb called, its result shown."""

from typing import Unpack

import click

from loralens.cli import options
from loralens.cli.show import Rows, show
from loralens.verbs.outputs.writing import WritingAndReading
from loralens.verbs.scale import scale


@click.command("scale")
@click.argument("adapter")
@click.option(
    "--by",
    type=float,
    required=True,
    callback=options.finite,
    metavar="X",
    help="The factor that multiplies ΔW.",
)
@options.MODULES
@options.writing
def command(adapter: str, by: float, modules: tuple[str, ...], rows: Rows, **files: Unpack[WritingAndReading]) -> None:
    """Write ADAPTER with X·ΔW; with --modules only there, the others as they are.

    The factors stay, to the bit: only the scale changes. --by 0 makes zeros.
    """
    show(scale(adapter, by, modules=modules, **files), rows)
