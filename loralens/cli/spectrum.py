"""``loralens spectrum``: options in, the verb called, its result shown."""

from typing import Unpack, get_args

import click

from loralens.cli import options
from loralens.cli.show import Rows, show
from loralens.verbs.inputs.adapters import Reading
from loralens.verbs.spectrum import Sort, spectrum


@click.command("spectrum")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@options.MODULES
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="Only the first N modules in the order of --sort.")
@click.option(
    "--sort",
    type=click.Choice(get_args(Sort)),
    help="Largest first; 'name' is natural order. [default: name; with --top: frobenius]",
)
@click.option("--base", metavar="MODEL", help="Also say how large ΔW is beside W. " + options.BASE_HELP)
@click.option("--device", metavar="NAME", help="Where to work on W: cpu, cuda or cuda:N. [default: cpu]")
@options.rows(csv="One line a module.", plot="Draw the spectra: .png, .svg or .pdf.")
@options.reading
def command(
    adapters: tuple[str, ...],
    modules: tuple[str, ...],
    top: int | None,
    sort: Sort | None,
    base: str | None,
    device: str | None,
    rows: Rows,
    **reading: Unpack[Reading],
) -> None:
    """Show the singular values of ΔW = scale·B·A for every module, and the ranks and norms they imply.

    ADAPTER is a file, a folder that holds one, or a Hub id in the local cache. ΔW is never formed.
    """
    show(spectrum(*adapters, modules=modules, top=top, sort=sort, base=base, device=device, **reading), rows)
