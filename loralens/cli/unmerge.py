"""The command ``loralens unmerge``: declares its options, calls the verb and shows the result."""

from pathlib import Path
from typing import Any

import click

import loralens
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


@click.command("unmerge")
@click.argument("merged", type=options.PATH)
@options.output("OUT", "Where the base is written: a folder, or a file if MERGED is one.")
@click.option(
    "--undo",
    type=options.PATH,
    metavar="FILE",
    help="The undo patch of the merge, which restores every bit. [default: undo.loralens in MERGED; for "
    "a file MERGED.gguf MERGED.undo.loralens]",
)
@click.option(
    "--adapter",
    multiple=True,
    metavar="ADAPTER[:W]",
    help="The adapter that was merged, with weight W. It is subtracted, and no undo patch is used. Repeatable.",
)
@options.device(note=options.SAME_BITS)
@options.OVERWRITE
@options.DRY_RUN
@options.modules
@row_options(verbose="Also list the tensors.")
@options.reading
def command(merged: Path, adapter: tuple[str, ...], rows: RowOptions, **keywords: Any) -> None:
    """Restore the base that adapters were merged into.

    The undo patch restores every bit of the base, which its SHA-256 proves. --adapter subtracts the update instead, and
    the entries that rounding leaves uncertain are counted. Several merges are undone in reverse order; of single files,
    keep the undo file of each merge.
    """
    show(loralens.unmerge(merged, adapter=[*map(options.split_weight, adapter)], **keywords), rows)
