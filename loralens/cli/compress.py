"""``loralens compress``: options in, the verb called, its result shown."""

from pathlib import Path
from typing import Unpack

import click

from loralens.cli import compress_rule, options
from loralens.cli.show import Rows, show
from loralens.formats import QUANTISED
from loralens.verbs.compress import compress
from loralens.verbs.inputs.choices import FLOAT_TYPES, FloatType
from loralens.verbs.outputs.form import INTEGER_TYPES, TARGET_FORMATS, IntegerType, TargetFormat
from loralens.verbs.outputs.rules import RulesAndReading


@click.command("compress")
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="TARGET", help="File or folder to write.")
@compress_rule.rules
@click.option("--uniform", is_flag=True, help="One rank everywhere: what LoRAX and mlx-lm want.")
@compress_rule.PROTECT
@compress_rule.ACTIVATIONS
@click.option("--base", metavar="MODEL", help=f"{options.BASE_HELP} For DoRA's magnitudes, and for GGUF.")
@click.option("--to", type=click.Choice(TARGET_FORMATS), help="The dialect to write. [default: the source's own]")
@click.option(
    "--dtype",
    type=click.Choice([*FLOAT_TYPES, *INTEGER_TYPES]),
    help=f"Round the factors to this; int8 and int4 are written as {QUANTISED}. [default: as they are]",
)
@options.MODULES
@click.option("--drop-dead", is_flag=True, help="Leave out modules that do nothing, or that the budget cannot pay for.")
@click.option("--overwrite", is_flag=True, help="Replace TARGET.")
@click.option("--dry-run", is_flag=True, help="Report, and write nothing.")
@options.rows(json="Machine-readable report.", csv="One line a module.", plot="Draw what every rank would cost.")
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
    rows: Rows,
    **rules_and_reading: Unpack[RulesAndReading],
) -> None:
    """Write SOURCE with fewer directions: the best update of the smaller ranks, and what it lost.

    Give one of the rules. The first four look at each module alone, --parameters and --size at all of them together:
    directions go where they save most, and with --to loralens-q bits too. The scale of every module stays. What is not
    half of a pair rides along. The errors reported are those of the file, read back. SOURCE is never written over.
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
