"""The command ``loralens drop``: declares its options, calls the verb and shows the result."""

from typing import Any

import click

import loralens
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


@click.command("drop")
@click.argument("adapter")
# `options.MODULES` does not fit: this option says what is left out, not what is chosen.
@click.option(
    "--modules",
    "-m",
    metavar="GLOB",
    multiple=True,
    help="Leave out the modules whose name or kind matches this glob pattern, or has it as whole parts. Repeatable.",
)
@click.option(
    "--block",
    metavar="BLOCK",
    multiple=True,
    help="Leave out these blocks: 3, 4-8, or IN04 of an image model; with -m, what both choose. Repeatable.",
)
@options.blocks
@row_options(csv="module", verbose="Also list the modules.")
@options.writing
def command(adapter: str, modules: tuple[str, ...], rows: RowOptions, **keywords: Any) -> None:
    """Write an adapter without the modules that match a glob pattern, to see what they contribute.

    The other modules keep their stored bits. What belongs to a dropped module (a magnitude of DoRA, a bias on B) is
    dropped with it; heads and other tensors that were trained in full stay. With --preset or --block-weights, the
    blocks of an image model that have the weight 0 are left out.
    """
    show(loralens.drop(adapter, modules, **keywords), rows)
