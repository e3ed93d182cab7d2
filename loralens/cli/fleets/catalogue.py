"""The sub-commands of ``loralens fleet`` that make an index and show what is in it."""

from pathlib import Path
from typing import Any

import click

from loralens.cli import options
from loralens.cli.fleets.lines import print_lines
from loralens.cli.fleets.options import FLEET
from loralens.cli.show import RowOptions, row_options, show


@click.command("index")
@click.argument("folder", metavar="DIR", type=options.PATH)
@click.option(
    "--output",
    "-o",
    type=options.PATH,
    metavar="HOME",
    help="The folder of the index.  [default: .loralens-fleet in DIR]",
)
@click.option(
    "--jobs",
    "-j",
    type=options.COUNT,
    metavar="N",
    help="Measure the files in N processes.  [default: one for each processor from 400 files on, else threads]",
)
@click.option(
    "--dask",
    metavar="ADDRESS",
    help="Measure the files on the workers of this Dask scheduler; they need the disk.",
)
@options.ONCE
@row_options(csv="file that has changed")
def command_index(folder: Path, rows: RowOptions, **keywords: Any) -> None:
    """Make or update the index of all adapters under DIR.

    Only files that are new or have changed are read. A file that cannot be read is listed with the reason. The exit
    code is 0 whatever is there. A run that is interrupted or killed goes on from there when it is called again.
    """
    if keywords["dask"] and keywords["jobs"]:
        raise click.UsageError("--jobs and --dask exclude each other: the workers of Dask are as many as were started")
    from loralens.verbs.fleets.fleet_verbs import index_fleet

    show(index_fleet(folder, **keywords), rows)


@click.command("rows")
@click.argument("sql", metavar='"SELECT …"')
@FLEET
@row_options(csv="row")
def command_rows(sql: str, fleet: Path, rows: RowOptions) -> None:
    """Show what the catalogue answers to a SELECT.

    The tables are adapters, unreadable, files (both, and files without LoRA pairs) and signatures. The catalogue is
    opened for reading only.
    """
    from loralens.verbs.fleets.fleet_verbs import open_fleet

    show(open_fleet(fleet).rows(sql), rows)


@click.command("stats")
@FLEET
@click.option(
    "--above",
    type=options.COUNT,
    metavar="R",
    help="Print only the names of the adapters with a module of a rank above R, one per line.",
)
@row_options(csv="rank")
def command_stats(fleet: Path, rows: RowOptions, above: int | None) -> None:
    """Count adapters, ranks and dialects, and say which rank a server must allow."""
    from loralens.verbs.fleets.fleet_verbs import open_fleet

    opened = open_fleet(fleet)
    if above is not None:
        print_lines(opened.stats().above(above), complete=opened.command("stats", "--json"), key="above")
        return
    show(opened.stats(), rows)


@click.command("empty")
@FLEET
@row_options(csv="adapter with ΔW = 0 in a module")
def command_empty(fleet: Path, rows: RowOptions) -> None:
    """List the adapters that change no weight, because ΔW is 0 in all their modules."""
    from loralens.verbs.fleets.fleet_verbs import open_fleet

    show(open_fleet(fleet).empty(), rows)
