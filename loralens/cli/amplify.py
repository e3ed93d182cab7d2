"""The command ``loralens amplify``: declares its options, calls the verb and shows the result."""

from typing import Any

import click

import loralens
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


@click.command("amplify")
@click.argument("adapter", metavar="ADAPTER")
@options.base(required=True)
# Several ranks in one call, since Table 7 of the paper compares r = 4 with r = 64.
@click.option(
    "--rank",
    type=options.COUNT,
    multiple=True,
    metavar="R",
    help="Look at the R leading directions of ΔW only. Repeatable. [default: all]",
)
@click.option(
    "--no-top", is_flag=True, help="Leave out the comparison with the leading directions of W, which takes long."
)
@click.option(
    "--directions",
    type=options.COUNT,
    metavar="N",
    help="The number of leading directions of W to compare with. [default: as many as of ΔW]",
)
# The default is a randomised Krylov SVD, whose error is part of the result.
@click.option(
    "--exact",
    is_flag=True,
    help="Take a dense SVD of every W: minutes and more memory for a large weight.",
)
# φ is a table of this many rows and columns for every module, which --json prints whole.
@click.option(
    "--phi-rank", type=options.COUNT, default=16, show_default=True, metavar="N", help="The largest i and j of φ(i, j)."
)
@options.device()
@options.seed("the sketch of W and the starting vectors")
@options.cache("directions")
@options.modules
@row_options(csv="module and rank", plot="the amplification of every module")
@options.reading
def command(adapter: str, rows: RowOptions, **keywords: Any) -> None:
    """Show how strongly ΔW amplifies W: ‖ΔW‖/‖UᵀWV‖, with U, V the singular directions of ΔW (LoRA paper, Table 7).

    The factor is shown with three comparisons: the share of W that random directions would catch, the excess of ΔW
    over them with its z-score, and the largest share that any directions could catch. At most two weights of the base
    are read at a time. The leading directions of large weights are kept for the next run.
    """
    show(loralens.amplify(adapter, **keywords), rows)
