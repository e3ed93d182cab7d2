"""The command ``loralens spectrum``: declares its options, calls the verb and shows the result."""

from typing import Any, get_args

import click

import loralens
from loralens.choices import Sort
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


@click.command("spectrum")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@options.modules
# In place of the --top that `row_options` would declare: with it the modules are sorted by their norm by default.
@click.option("--top", type=options.COUNT, metavar="N", help="Show only the first N modules in the order of --sort.")
@click.option(
    "--sort",
    type=click.Choice(get_args(Sort)),
    help="The quantity that modules are sorted by, largest first; 'name' sorts by name. [default: name; with --top: "
    "frobenius]",
)
@options.base("Also say how large ΔW is in relation to W.")
# No default, since the verb refuses a device without --base: only the norms of W are computed on it.
@options.device(None)
@row_options(csv="module", plot="the spectra", top=False)
@options.reading
def command(adapters: tuple[str, ...], rows: RowOptions, **keywords: Any) -> None:
    """Show the singular values of ΔW = scale·B·A for every module, and the ranks and norms that follow from them.

    ADAPTER is a file, a folder that holds one, or a Hub id in the local cache. ΔW is never formed: the cost is O((out +
    in)·r²) per module.
    """
    show(loralens.spectrum(*adapters, **keywords), rows)
