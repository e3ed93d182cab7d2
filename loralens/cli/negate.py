"""The command ``loralens negate``: declares its options, calls the verb and shows the result."""

from typing import Unpack

import click

from loralens.cli import options
from loralens.cli.show import RowOptions, show
from loralens.verbs.negate import negate
from loralens.verbs.outputs.writing import WritingAndReading


@click.command("negate")
@click.argument("adapter")
@options.MODULES
@options.writing
def command(adapter: str, modules: tuple[str, ...], rows: RowOptions, **files: Unpack[WritingAndReading]) -> None:
    """Write an adapter with the sign of ΔW changed.

    With --modules only these modules change. The factors keep their bits: only the scale changes its sign.
    """
    show(negate(adapter, modules=modules, **files), rows)
