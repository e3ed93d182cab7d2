"""``loralens drop``: options in, the verb called, its result shown."""

from typing import Unpack

import click

from loralens.cli import options
from loralens.cli.show import Rows, show
from loralens.verbs.drop import drop
from loralens.verbs.outputs.writing import WritingAndReading


@click.command("drop")
@click.argument("adapter")
@click.option(
    "--modules",
    "-m",
    metavar="GLOB",
    multiple=True,
    required=True,
    help="Leave out the modules whose name or kind matches this glob pattern. Repeatable.",
)
@options.writing
def command(adapter: str, modules: tuple[str, ...], rows: Rows, **files: Unpack[WritingAndReading]) -> None:
    """Write ADAPTER without the modules that match GLOB: what a block does is seen when it is gone.

    The others keep their stored bits. What hangs on a module (DoRA's magnitude, a bias on B) goes with it; heads and
    other tensors trained in full stay.
    """
    show(drop(adapter, modules, **files), rows)
