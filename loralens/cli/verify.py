"""The command ``loralens verify``: declares its options, calls the verb and shows the result."""

from typing import Any, get_args

import click

import loralens
from loralens.choices import RoundingMode
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


@click.command("verify")
@click.argument("merged")
@options.base("Goes with --adapter.")
@click.option(
    "--adapter",
    multiple=True,
    metavar="ADAPTER[:W]",
    help="An adapter that was merged, with weight W. Repeatable. Goes with --base.",
)
# The merge is repeated, so these have to be the options with which it was made.
@click.option(
    "--rounding",
    type=click.Choice(get_args(RoundingMode)),
    help="How the merge rounded the new weights. [default: as its certificate says; without one, nearest]",
)
@click.option(
    "--seed",
    type=click.INT,
    metavar="N",
    help="Seed of the random numbers for stochastic rounding. [default: as the certificate says; without one, 0]",
)
@options.untying(
    "Whether the merge gave the head a weight of its own. [default: as in MERGED, or if the adapter needs one]"
)
@options.device(note=options.SAME_BITS)
@options.modules
@row_options(csv="module")
@options.reading
def command(merged: str, adapter: tuple[str, ...], rows: RowOptions, **keywords: Any) -> None:
    """Test for every module of an adapter whether a merged model holds its update, by repeating the merge.

    Without --base and --adapter: test whether the model is unchanged since its merge, by the certificate in its folder.
    The exit code is 1 if a tensor changed. Whether an adapter is in the model is not tested.

    exact: every bit is the one that loralens writes. rounded: the update is there in full, with another rounding.
    partial: the strength of the update is below 0.9 or above 1.1, or differs from what the rounding predicts. absent:
    the strength is below 0.1, as in the base or another model. If the rounding itself lost an update, it is partial or
    absent, even if every bit is the one that loralens writes. The answer for the model is that of its worst module. The
    exit code is 0 for exact and rounded, 1 for partial and absent.
    """
    result = loralens.verify(merged, adapter=[*map(options.split_weight, adapter)], **keywords)
    show(result, rows)
    # 1 is the answer no. Errors exit with 2, so that scripts can tell them apart.
    if not result.answer:
        click.get_current_context().exit(1)
