"""The command ``loralens fleet bases``: the base models of the adapters of a fleet."""

from pathlib import Path

import click

from loralens.cli.fleets.options import FLEET
from loralens.cli.show import RowOptions, row_options, show


@click.command("bases")
@FLEET
@row_options(csv="adapter")
def command_bases(fleet: Path, rows: RowOptions) -> None:
    """Show which base model each adapter is for: the one that it names, or the one that it shows.

    If a file names no base, the names and shapes of its modules show it, or other adapters of the fleet that are like
    it. If several bases fit, the base is unknown. Adapters that name a base whose weights they do not fit are listed.
    """
    from loralens.verbs.fleets.fleet_verbs import open_fleet

    show(open_fleet(fleet).bases(), rows)
