"""The commands ``loralens fleet copies``, ``runs`` and ``families``: groups of the adapters of a fleet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from loralens.cli.fleets.options import FLEET
from loralens.cli.show import RowOptions, row_options, show
from loralens.core.messages import warn
from loralens.tables.numbers import count

SKETCH = click.option("--sketch", is_flag=True, help="State cosines by sketches, and read no file of the fleet.")


@click.command("copies")
@FLEET
@click.option("--paths", is_flag=True, help="Print only the files that can be deleted without a loss, one per line.")
@row_options(csv="copy")
def command_copies(fleet: Path, rows: RowOptions, paths: bool) -> None:
    """Find adapters that are the same update as another, and say which files can be deleted.

    Copies in another dialect, dtype or rank and with other factors are found too, and every copy is confirmed by
    reading both files. One file of each group stays, and so does every target of a link. Paths that lead to one file
    through a link are not copies, and checkpoints of different steps are not either.
    """
    from loralens.verbs.fleet import open_fleet

    result = open_fleet(fleet).copies()
    if paths:
        _print_paths(result.safe_to_delete)
        return
    show(result, rows)


def _print_paths(paths: Sequence[Path]) -> None:
    """Print the paths that are printed as they are; a program that deletes them must not be given another name."""
    exact = [path for path in paths if str(path).isprintable()]
    for path in exact:
        click.echo(str(path))
    left_out = len(paths) - len(exact)
    if left_out:
        warn(
            f"{count(left_out, 'path')} with a line end, a control character or a wrong encoding left out",
            fix="loralens fleet copies --json has them in safe_to_delete",
        )


@click.command("runs")
@FLEET
@SKETCH
@row_options(csv="adapter")
def command_runs(fleet: Path, rows: RowOptions, **keywords: Any) -> None:
    """Group the adapters that began from the same random A: checkpoints of one run, and runs with one seed."""
    from loralens.verbs.fleet import open_fleet

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
    from loralens.verbs.fleet import open_fleet

    show(open_fleet(fleet).families(**keywords), rows)
