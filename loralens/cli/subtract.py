"""The command ``loralens subtract``: declares its options, calls the verb and shows the result."""

from typing import Any

import click

import loralens
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


@click.command("subtract")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@options.modules
@options.take("both")
# What is equal in both adapters becomes zeros, which not everybody wants to store.
@options.DROP_DEAD
@options.FORCE
@row_options(csv="module")
@options.writing
def command(first: str, second: str, rows: RowOptions, **keywords: Any) -> None:
    """Write the difference A − B of two adapters, exactly.

    With --modules B is subtracted only in these modules. What is equal in both becomes exact zeros.
    """
    show(loralens.subtract(first, second, **keywords), rows)
