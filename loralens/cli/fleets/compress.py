"""The command ``loralens fleet compress``: declares its options, calls the fleet and shows the result."""

from pathlib import Path
from typing import Any

import click

from loralens.cli import options
from loralens.cli.fleets.options import FLEET, check_workers, workers
from loralens.cli.show import RowOptions, row_options, show


@click.command("compress")
@FLEET
@options.output("FILE", "The .safetensors file to write.", required=True)
@click.option(
    "--error",
    type=float,
    default=0.15,
    show_default=True,
    callback=options.refuse_non_finite,
    help="The largest ‖ΔW−ΔW'‖/‖ΔW‖ of an adapter.",
)
@workers("compress the groups", default="one after the other in this process")
@options.OVERWRITE
@row_options(csv="adapter")
def command_compress(fleet: Path, output: Path, rows: RowOptions, **keywords: Any) -> None:
    """Write all adapters of a fleet to one file, in the fewest bytes at a given error.

    Adapters of one run share bases, and each has a small core in them. Copies are stored once, and so are equal heads
    and other tensors. Adapters that take fewer bytes alone are stored alone in few bits. The errors are those of the
    written file, read back.
    """
    check_workers(keywords)
    from loralens.verbs.fleet import compress_index

    show(compress_index(fleet, output, **keywords), rows)
