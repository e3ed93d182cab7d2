"""The command ``loralens extract``: declares its options, calls the verb and shows the result."""

from typing import Any, get_args

import click

import loralens
from loralens.choices import FLOAT_TYPES, TARGET_FORMATS, Noise
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


@click.command("extract")
@options.base(required=True)
@click.option("--tuned", required=True, metavar="MODEL", help="The fine-tuned or merged model, in the same forms.")
@options.output("TARGET", "The file or folder to write.")
@options.rank_rules
@click.option(
    "--noise-edge",
    type=click.Choice(get_args(Noise)),
    # With these two, --noise-edge alone means --noise-edge rounding.
    is_flag=False,
    flag_value="rounding",
    help="Keep the directions that stand above the noise. 'rounding' is the noise of rounding to the dtype of --tuned; "
    "'median' estimates unknown noise from the median of all singular values, if the difference has full rank. "
    "[default without a value: rounding]",
)
@options.UNIFORM
# The default for large matrices is a randomised SVD, whose error is part of the result.
@click.option("--exact", is_flag=True, help="Take dense SVDs in float64, which is slow for large matrices.")
# There is no source whose dialect could be the default.
@click.option(
    "--to", type=click.Choice(TARGET_FORMATS), default="peft", show_default=True, help="The dialect to write."
)
# There is no adapter whose dtypes could be kept.
@click.option(
    "--dtype",
    type=click.Choice(list(FLOAT_TYPES)),
    default="f32",
    show_default=True,
    help="The dtype of all factors.",
)
@options.modules
@click.option("--drop-extra", is_flag=True, help="Leave out what is not a matrix: norms, biases and new heads.")
@options.OVERWRITE
@options.DRY_RUN
@row_options(csv="module")
# Without `options.reading`: both are models, which have neither a dialect nor α.
def command(base: str, tuned: str, rows: RowOptions, **keywords: Any) -> None:
    """Make an adapter from the difference of two models: of a full fine-tune, or of a merge by another tool.

    One rule of ranks, as in `compress`, or --noise-edge has to be given. Every weight matrix that differs becomes a
    pair of factors; embeddings only if --modules asks for them (* for all). Norms, biases and new heads are copied in
    full. Everything that differs and is not in the adapter is listed. The names are those of --tuned; for PEFT those
    that transformers 5 has in memory.
    """
    options.require_output(keywords)
    show(loralens.extract(base, tuned, **keywords), rows)
