"""The command ``loralens fleet near``: searches a fleet for the adapters that are most like an example."""

from pathlib import Path
from typing import Any

import click

from loralens.cli import options
from loralens.cli.fleets.options import FLEET
from loralens.cli.show import RowOptions, row_options, show


@click.command("near")
@click.argument("adapter", metavar="ADAPTER", type=options.PATH)
@click.option("-k", type=options.COUNT, default=10, show_default=True, metavar="N", help="The number of neighbours.")
@click.option("--sketch", is_flag=True, help="Compare sketches only, and read no file of the fleet.")
@click.option("--exact", is_flag=True, help="Compare every adapter exactly that has a module of the example.")
@FLEET
@row_options(csv="neighbour")
def command_near(adapter: Path, fleet: Path, rows: RowOptions, **keywords: Any) -> None:
    """Find the adapters of a fleet whose updates are most like ADAPTER.

    ADAPTER is a file, a folder that holds one, or the name of an adapter in the fleet. Sketches propose adapters, and
    the nearest of them are read and compared exactly. The cosine is that of the whole updates, where a module that one
    of them lacks counts as 0; `common` is the cosine over the modules that both have.
    """
    # Imported here, since the help of a command needs no NumPy.
    from loralens.verbs.fleets.fleet_verbs import open_fleet

    show(open_fleet(fleet).near(adapter, **keywords), rows)
