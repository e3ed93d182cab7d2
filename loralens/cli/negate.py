"""The command ``loralens negate``: declares its options, calls the verb and shows the result."""

from typing import Any

import click

from loralens.cli import options
from loralens.cli.show import RowOptions, show
from loralens.verbs.negate import negate


@click.command("negate")
@click.argument("adapter")
@options.MODULES
@options.writing
def command(adapter: str, rows: RowOptions, **keywords: Any) -> None:
    """Write an adapter with the sign of ΔW changed.

    With --modules only these modules change. The factors keep their bits: only the scale changes its sign.
    """
    show(negate(adapter, **keywords), rows)
