"""The command ``loralens scale``: declares its options, calls the verb and shows the result."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import click

import loralens
from loralens.cli import options
from loralens.cli.several import run_verb
from loralens.cli.show import RowOptions, row_options
from loralens.errors import OptionError

_NUMBER = re.compile(r"[+-]?\d*[.,]?\d+")


@click.command("scale")
@click.argument("adapter", nargs=-1, required=True, metavar="ADAPTER...")
@click.option(
    "--by",
    type=float,
    callback=options.refuse_non_finite,
    metavar="X",
    help="The factor that multiplies ΔW. [default with weights of blocks: 1]",
)
@options.modules
@options.blocks
@options.JOBS
@row_options(csv="module")
@partial(options.writing, several=True)
def command(adapter: tuple[str, ...], by: float | None, rows: RowOptions, **keywords: Any) -> None:
    """Write an adapter with ΔW multiplied by a number.

    With --modules only these modules change. The factors keep their bits: only the scale changes. With --by 0 every ΔW
    is zero. With --preset or --block-weights, each block of an image model has its own weight, which --by multiplies.

    Several ADAPTERs, or a folder that has some in it, are written into the folder OUT, each under its own name.
    What exists there is skipped, unless --overwrite is given.
    """
    stated = by is not None or keywords["preset"] is not None or keywords["block_weights"] is not None
    number = next((word for word in adapter if _NUMBER.fullmatch(word) and not Path(word).exists()), None)
    if number is not None and not stated:
        raise OptionError(
            f"{number} is not an adapter", fix=f"give the factor with --by: --by {number.replace(',', '.')}"
        )
    run_verb(loralens.scale, adapter, rows, by, **keywords)
