"""The command ``loralens compress``: declares its options, calls the verb and shows the result."""

from typing import Any

import click

import loralens
from loralens.cli import options
from loralens.cli.several import run_verb
from loralens.cli.show import RowOptions, row_options


@click.command("compress")
@click.argument("source", nargs=-1, required=True, metavar="SOURCE...")
@options.output("TARGET", options.TARGET_OR_FOLDER)
@options.rank_rules
@options.UNIFORM
@options.PROTECT
@options.ACTIVATIONS
@options.base("Needed for DoRA's magnitudes, and for GGUF.")
@options.to()
@options.DTYPE
@options.modules
# `options.DROP_DEAD` does not fit, since a budget may also give a module no rank.
@click.option(
    "--drop-dead", is_flag=True, help="Leave out modules whose update is zero, or that get no rank from the budget."
)
@click.option(
    "--only-if-smaller",
    is_flag=True,
    help="Write nothing, and exit with 1, if the file would not become smaller.",
)
@click.option("--force", is_flag=True, help="Exit with 0 also if the file becomes larger, as with another --dtype.")
@options.OVERWRITE
@options.DRY_RUN
@options.JOBS
@row_options(csv="module", plot="the size and the error of every rank", overwrites=True)
@options.reading
def command(source: tuple[str, ...], rows: RowOptions, **keywords: Any) -> None:
    """Write an adapter with fewer directions: the best update of the smaller ranks, and the error that it has.

    One of the rules has to be given. --rank, --energy, --error and --sv-ratio look at each module alone. --parameters
    and --size are budgets for all modules together: they give directions to the modules where they reduce the error
    most. The scale of every module stays. Tensors that belong to no pair of factors are copied. The errors are those of
    the written file, read back. The source is never overwritten.

    If the file would not become smaller, the adapter is written as it was, unless --to, --dtype or --uniform asks for
    another form. If such a file is larger than the source, the command exits with 1 unless --force is given.

    Several SOURCEs, or a folder that has adapters in it, are written into the folder TARGET, each under its own name.
    What exists there is skipped, unless --overwrite is given.
    """
    options.require_output(keywords)
    run_verb(loralens.compress, source, rows, **keywords)
