"""The command ``loralens compress``: declares its options, calls the verb and shows the result."""

from pathlib import Path
from typing import Unpack

import click

from loralens.cli import options
from loralens.cli.show import RowOptions, show
from loralens.formats import QUANTISED
from loralens.verbs.compress import compress
from loralens.verbs.inputs.choices import INTEGER_TYPES, FloatType, IntegerType, TargetFormat
from loralens.verbs.outputs.rules import RulesAndReading


@click.command("compress")
@click.argument("source")
@options.output("TARGET", "The file or folder to write.")
@options.rank_rules
@options.UNIFORM
@options.PROTECT
@options.ACTIVATIONS
@options.base("Needed for DoRA's magnitudes, and for GGUF.")
@options.to()
@options.dtype(tuple(INTEGER_TYPES), note=f"; int8 and int4 are written as {QUANTISED}")
@options.MODULES
@click.option(
    "--drop-dead", is_flag=True, help="Leave out modules whose update is zero, or that get no rank from the budget."
)
@options.OVERWRITE
@options.DRY_RUN
@options.rows(csv="module", plot="the size and the error of every rank")
@options.reading
def command(
    source: str,
    output: Path | None,
    uniform: bool,
    weights: str,
    activations: str | None,
    base: str | None,
    to: TargetFormat | None,
    dtype: FloatType | IntegerType | None,
    modules: tuple[str, ...],
    drop_dead: bool,
    overwrite: bool,
    dry_run: bool,
    rows: RowOptions,
    **rules_and_reading: Unpack[RulesAndReading],
) -> None:
    """Write an adapter with fewer directions: the best update of the smaller ranks, and the error that it has.

    One of the rules has to be given. --rank, --energy, --error and --sv-ratio look at each module alone. --parameters
    and --size are budgets for all modules together: they give directions (and for loralens-q also bits) to the modules
    where they reduce the error most. The scale of every module stays. Tensors that belong to no pair of factors are
    copied. The errors are those of the written file, read back. The source is never overwritten.
    """
    options.require_output(output, dry_run=dry_run)
    result = compress(
        source,
        output=output,
        uniform=uniform,
        weights=weights,
        activations=activations,
        base=base,
        to=to,
        dtype=dtype,
        modules=modules,
        drop_dead=drop_dead,
        overwrite=overwrite,
        dry_run=dry_run,
        **rules_and_reading,
    )
    show(result, rows)
