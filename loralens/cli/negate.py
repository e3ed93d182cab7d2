"""``loralens negate``: options in, the verb called, its result shown."""

from typing import Unpack

import click

from loralens.cli import options
from loralens.cli.show import Rows, show
from loralens.verbs.negate import negate
from loralens.verbs.outputs.writing import WritingAndReading


@click.command("negate")
@click.argument("adapter")
@options.MODULES
@options.writing
def command(adapter: str, modules: tuple[str, ...], rows: Rows, **files: Unpack[WritingAndReading]) -> None:
    """Write ADAPTER with the sign of ΔW changed; with --modules only there, the others as they are.

    The factors stay, to the bit: the scale changes its sign.
    """
    show(negate(adapter, modules=modules, **files), rows)
