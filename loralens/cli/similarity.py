"""``loralens similarity``: options in, the verb called, its result shown."""

from typing import Unpack, get_args

import click

from loralens.analysis.compare.pairwise import Of, Side
from loralens.cli import options
from loralens.cli.show import Rows, show
from loralens.verbs.inputs.adapters import Reading
from loralens.verbs.similarity import similarity


@click.command("similarity")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option(
    "--of",
    type=click.Choice(get_args(Of)),
    default="update",
    show_default=True,
    help="Whose directions: of ΔW, or of A (the LoRA paper's own quantity) or B alone.",
)
@click.option(
    "--side",
    type=click.Choice(get_args(Side)),
    help="Directions of the inputs or the outputs. [default: in; of B: out]",
)
@options.MODULES
@click.option(
    "--phi-rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="Compare at most the N leading directions. [default: all]",
)
@options.rows(
    csv="One line a module; of one adapter a pair of modules, of three and more a pair of adapters.",
    plot="Draw φ(i, j): .png, .svg or .pdf.",
    json="Machine-readable, with the whole φ(i, j) of every module.",
)
@options.reading
def command(
    adapters: tuple[str, ...],
    of: Of,
    side: Side | None,
    modules: tuple[str, ...],
    phi_rank: int | None,
    rows: Rows,
    **reading: Unpack[Reading],
) -> None:
    """Compare the directions of adapters, beside what chance would give.

    One ADAPTER: its own modules of equal width against each other. Two: φ(i, j), cosine, principal angles and CKA of
    every module. More: every pair, clustered. --alpha and --scale go to those that do not say their own.
    """
    show(similarity(*adapters, of=of, side=side, modules=modules, phi_rank=phi_rank, **reading), rows)
