"""The command ``loralens negate``: declares its options, calls the verb and shows the result."""

from typing import Any

import click

import loralens
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


@click.command("negate")
@click.argument("adapter")
# Without --drop-dead: a change of sign makes nothing zero.
@options.modules
@row_options(csv="module")
@options.writing
def command(adapter: str, rows: RowOptions, **keywords: Any) -> None:
    """Write an adapter with the sign of ΔW changed.

    With --modules only these modules change. The factors keep their bits: only the scale changes its sign.
    """
    show(loralens.negate(adapter, **keywords), rows)
