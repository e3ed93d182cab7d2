"""The command ``loralens fleet expand``: declares its options, calls the fleet and shows the result."""

from pathlib import Path
from typing import Any

import click

from loralens.choices import TARGET_FORMATS
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


@click.command("expand")
@click.argument("file", type=options.PATH)
@click.argument("name")
@options.output("DIR", "The folder to write.", required=True)
@click.option(
    "--rank",
    type=options.COUNT,
    metavar="R",
    help="The largest rank of a module. [default: the rank that the adapter had]",
)
@click.option(
    "--to",
    type=click.Choice(TARGET_FORMATS),
    default="peft",
    show_default=True,
    help="The dialect to write.",
)
@options.OVERWRITE
@row_options()
def command_expand(file: Path, name: str, output: Path, rows: RowOptions, **keywords: Any) -> None:
    """Write one adapter of a compressed fleet, as a PEFT adapter unless --to says otherwise.

    The printed error was measured when the fleet was compressed. With --rank it is a bound.
    """
    from loralens.fleet.fleet import Fleet

    show(Fleet.expand(file, name, output, **keywords), rows)
