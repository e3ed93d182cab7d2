"""The command ``loralens convert``: declares its options, calls the verb and shows the result."""

from typing import Any

import click

import loralens
from loralens.cli import options
from loralens.cli.several import run_verb
from loralens.cli.show import RowOptions, row_options


@click.command("convert")
@click.argument("source", nargs=-1, required=True, metavar="SOURCE...")
@options.output("TARGET", options.TARGET_OR_FOLDER)
@options.to("each source, if another option says what changes")
@options.base("Only the names and shapes of its weights are read.")
@click.option(
    "--arch", metavar="NAME", help="The architecture that GGUF states, such as llama or qwen2. [default: from --base]"
)
@options.DTYPE
@click.option(
    "--prefix",
    multiple=True,
    metavar="OLD=NEW",
    help="Rename modules whose name begins with OLD, so that it begins with NEW. Repeatable.",
)
@click.option(
    "--rank",
    type=options.COUNT,
    metavar="R",
    help="The rank of modules that are not a pair of factors yet (LoKr, LoHa, full differences).",
)
# Without it the conversion is refused, and the tensors are named.
@click.option("--drop-extra", is_flag=True, help="Leave out tensors that the target dialect has no place for.")
@options.ALLOW_LOSS
@options.OVERWRITE
@options.DRY_RUN
@options.JOBS
@row_options(csv="module", verbose="Also list the modules.")
@options.reading
def command(source: tuple[str, ...], rows: RowOptions, **keywords: Any) -> None:
    """Write an adapter in another dialect, with its names and scales.

    Scales and names that the target dialect cannot state are recorded in its metadata, so loralens reads its own files
    back without --base or --alpha. What the dialect cannot hold is folded into the factors where that is exact; where
    it is not, the conversion is refused and the tensor is named. The error of what --rank cuts off, and of rounding
    (--dtype, a scale that is folded in), is reported. The source is never overwritten.

    Several SOURCEs, or a folder that has adapters in it, are written into the folder TARGET, each under its own name.
    What exists there is skipped, unless --overwrite is given.
    """
    options.require_output(keywords)
    run_verb(loralens.convert, source, rows, **keywords)
