"""The command ``loralens similarity``: declares its options, calls the verb and shows the result."""

from typing import Any, get_args

import click

import loralens
from loralens.choices import Of, Side
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


@click.command("similarity")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option(
    "--of",
    type=click.Choice(get_args(Of)),
    default="update",
    show_default=True,
    help="The matrix whose directions are compared: ΔW, A alone (as in the LoRA paper), or B alone.",
)
# The in side of ΔW mostly shows the random start of A, which adapters of one seed share whatever they have learnt.
@click.option(
    "--side",
    type=click.Choice(get_args(Side)),
    help="Whether directions of the inputs or of the outputs are compared. [default: out; of A: in]",
)
@options.modules
@click.option(
    "--phi-rank",
    type=options.COUNT,
    metavar="N",
    help="Compare at most the N leading directions. [default: all]",
)
@click.option(
    "--phi",
    is_flag=True,
    help="With --json: also the map φ(i, j) of every module of two adapters, and its chance level.",
)
@row_options(
    csv="module (of one adapter: pair of modules; of three and more: pair of adapters)",
    plot="φ(i, j)",
)
@options.reading
def command(adapters: tuple[str, ...], rows: RowOptions, **keywords: Any) -> None:
    """Compare the directions of adapters with each other and with chance.

    One adapter: its own modules of equal width are compared with each other. Two adapters: φ(i, j), cosine, principal
    angles and CKA of every module. Three and more: every pair, clustered. --alpha and --scale are used for files that
    do not state their own. The folder of a grid of runs stands for its finished runs.
    """
    show(loralens.similarity(*adapters, **keywords), rows)
