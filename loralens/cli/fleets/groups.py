"""The commands ``loralens fleet copies``, ``runs`` and ``families``: groups of the adapters of a fleet."""

from pathlib import Path
from typing import Any

import click

from loralens.cli.fleets.lines import as_argument, print_lines
from loralens.cli.fleets.options import FLEET
from loralens.cli.show import RowOptions, row_options, show

SKETCH = click.option("--sketch", is_flag=True, help="State cosines by sketches, and read no file of the fleet.")


@click.command("copies")
@FLEET
@click.option("--paths", is_flag=True, help="Print only the files that can be deleted without a loss, one per line.")
@row_options(csv="copy")
def command_copies(fleet: Path, rows: RowOptions, paths: bool) -> None:
    """Find adapters that are the same update as another, and say which files can be deleted.

    Copies in another dialect, dtype or rank and with other factors are found too, and every copy is confirmed by
    reading both files. One file of each group stays, and so does every target of a link, and a copy that names another
    base. Paths that lead to one file through a link are not copies, and checkpoints of different steps are not either.
    """
    from loralens.verbs.fleets.fleet_verbs import open_fleet

    opened = open_fleet(fleet)
    result = opened.copies()
    if paths:
        lines = (as_argument(str(path)) for path in result.safe_to_delete)
        print_lines(lines, complete=opened.command("copies", "--json"), key="safe_to_delete")
        return
    show(result, rows)


@click.command("runs")
@FLEET
@SKETCH
@row_options(csv="adapter")
def command_runs(fleet: Path, rows: RowOptions, **keywords: Any) -> None:
    """Group the adapters that began from the same random A: checkpoints of one run, and runs with one seed."""
    from loralens.verbs.fleets.fleet_verbs import open_fleet

    show(open_fleet(fleet).runs(**keywords), rows)


@click.command("families")
@click.option(
    "--at",
    type=click.FloatRange(0.1, 1.0),
    default=0.5,
    show_default=True,
    metavar="COSINE",
    help="The smallest mean cosine within a family. 0.2 also joins adapters of one task by different authors.",
)
@FLEET
@SKETCH
@row_options(csv="adapter")
def command_families(fleet: Path, rows: RowOptions, **keywords: Any) -> None:
    """Group the adapters whose updates are alike, by average linkage of their cosines."""
    from loralens.verbs.fleets.fleet_verbs import open_fleet

    show(open_fleet(fleet).families(**keywords), rows)
