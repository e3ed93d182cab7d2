"""The command ``loralens intruders``: declares its options, calls the verb and shows the result."""

from typing import Any, get_args

import click

import loralens
from loralens.choices import FloatType
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


@click.command("intruders")
@click.argument("adapter", metavar="ADAPTER")
@options.base(required=True)
@options.modules
# 10 directions and the threshold 0.5 are the values of the paper, so that counts can be compared with it.
@click.option(
    "--top",
    type=options.COUNT,
    default=10,
    show_default=True,
    metavar="N",
    help="The number of leading singular directions of W + ΔW to look at.",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True),
    callback=options.refuse_non_finite,
    default=0.5,
    show_default=True,
    help="A direction is an intruder if no |cosine| with a direction of W is as large as this.",
)
@click.option(
    "--remove",
    type=float,
    callback=options.refuse_non_finite,
    metavar="λ",
    help="Write an adapter in which every intruder is multiplied by λ: 0 removes them, 1 keeps them. Needs -o.",
)
@options.output("TARGET", "The file or folder that --remove writes.")
@options.UNIFORM
# A default, since the factors that change are new ones; those of other modules keep their dtypes.
@click.option(
    "--dtype",
    type=click.Choice(get_args(FloatType)),
    default="f32",
    show_default=True,
    help="The dtype of the factors that --remove changes.",
)
@options.ALLOW_LOSS
@options.OVERWRITE
@options.DRY_RUN
@options.cache("SVDs")
@options.device()
# Without a --top for rows: the --top of this command is that of the definition.
@row_options(csv="module", top=False)
@options.reading
def command(adapter: str, rows: RowOptions, **keywords: Any) -> None:
    """Find the leading singular directions of W + ΔW that no singular direction of W resembles (arXiv 2410.21228).

    The score of a direction is the largest |cosine| of its left singular vector with those of W. If it is below
    --threshold, the direction is an intruder. Nearly every random direction is an intruder too, as the column "chance"
    shows: a low score means that the direction is spread over many directions of W, not that it is new to W. W is
    decomposed once, and its SVD is kept. W + ΔW is not decomposed.
    """
    # --remove without -o would have no effect, and -o without --remove would have nothing to write.
    if (keywords["remove"] is None) != (keywords["output"] is None):
        raise click.UsageError("--remove and -o must be given together")
    show(loralens.intruders(adapter, **keywords), rows)
