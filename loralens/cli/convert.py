"""``loralens convert``: options in, the verb called, its result shown."""

from pathlib import Path
from typing import Unpack

import click

from loralens.cli import options
from loralens.cli.show import Rows, show
from loralens.verbs.convert import convert
from loralens.verbs.inputs.adapters import Reading
from loralens.verbs.inputs.choices import FLOAT_TYPES, FloatType
from loralens.verbs.outputs.form import TARGET_FORMATS, TargetFormat


@click.command("convert")
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="TARGET", help="File or folder to write.")
@click.option("--to", type=click.Choice(TARGET_FORMATS), required=True, help="The dialect to write.")
@click.option(
    "--base", type=click.Path(path_type=Path), metavar="DIR", help="The base model: its weights' names, headers only."
)
@click.option("--arch", metavar="NAME", help="Architecture for GGUF, where --base does not say it: llama, qwen2 …")
@click.option("--dtype", type=click.Choice(list(FLOAT_TYPES)), help="Round the factors to this. [default: as they are]")
@click.option("--prefix", multiple=True, metavar="OLD=NEW", help="Rename modules that begin with OLD. Repeatable.")
@click.option("--rank", type=click.IntRange(min=1), help="Rank of modules that are no pair yet (LoKr, LoHa, full).")
@click.option("--drop-extra", is_flag=True, help="Leave out what the target has no place for.")
@options.ALLOW_LOSS
@click.option("--overwrite", is_flag=True, help="Replace TARGET.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@options.rows(json="Machine-readable report.")
@options.reading
def command(
    source: str,
    output: Path | None,
    to: TargetFormat,
    base: Path | None,
    arch: str | None,
    dtype: FloatType | None,
    prefix: tuple[str, ...],
    rank: int | None,
    drop_extra: bool,
    allow_loss: bool,
    overwrite: bool,
    dry_run: bool,
    rows: Rows,
    **reading: Unpack[Reading],
) -> None:
    """Write SOURCE in another dialect.

    Scales and names that the target cannot say are recorded in its metadata, so loralens reads its own files back
    without --base or --alpha. What the target cannot hold is folded into the factors where that is exact, and refused
    by name where it is not. What --rank cuts off, and what rounding costs (--dtype, loralens-q, a scale that is folded
    in), is said. SOURCE is never written over.
    """
    options.require_output(output, dry_run=dry_run)
    result = convert(
        source,
        output=output,
        to=to,
        base=base,
        arch=arch,
        dtype=dtype,
        prefix=prefix,
        rank=rank,
        drop_extra=drop_extra,
        allow_loss=allow_loss,
        overwrite=overwrite,
        dry_run=dry_run,
        **reading,
    )
    show(result, rows)
