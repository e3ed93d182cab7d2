"""``loralens intruders``: options in, the verb called, its result shown."""

from pathlib import Path
from typing import Unpack, get_args

import click

from loralens.cli import options
from loralens.cli.show import Rows, show
from loralens.verbs.inputs.adapters import Reading
from loralens.verbs.inputs.choices import FloatType
from loralens.verbs.intruders import intruders

PATH = click.Path(path_type=Path)


@click.command("intruders")
@click.argument("adapter", metavar="ADAPTER")
@click.option("--base", required=True, metavar="MODEL", help=options.BASE_HELP)
@options.MODULES
@click.option(
    "--top", type=click.IntRange(min=1), default=10, show_default=True, help="Look at so many leading directions."
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True),
    callback=options.finite,
    default=0.5,
    show_default=True,
    help="An intruder has no cosine as large as this with any direction of W.",
)
@click.option(
    "--remove",
    type=float,
    callback=options.finite,
    metavar="λ",
    help="Write an adapter that leaves λ of every intruder: 0 removes them, 1 keeps them. Needs -o.",
)
@click.option("-o", "--output", type=PATH, metavar="TARGET", help="Where --remove writes: a folder or a file.")
@click.option("--uniform", is_flag=True, help="Give all modules of the written adapter one rank, with zeros.")
@click.option(
    "--dtype", type=click.Choice(get_args(FloatType)), default="f32", show_default=True, help="Of the changed factors."
)
@options.ALLOW_LOSS
@click.option("--overwrite", is_flag=True, help="Replace TARGET.")
@click.option("--dry-run", is_flag=True, help="Say what --remove would write, and write nothing.")
@click.option("--cache", type=PATH, metavar="DIR", help="Where SVDs of W are kept. [default: the user's cache folder]")
@click.option("--cache-limit", default="20GB", show_default=True, metavar="SIZE", help="Drop the oldest beyond this.")
@click.option("--no-cache", is_flag=True, help="Keep no SVD, and use none that is kept.")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="NAME",
    help="Where SVDs of W are computed: cpu, cuda, cuda:1 …",
)
@options.rows(csv="One line a module.")
@options.reading
def command(
    adapter: str,
    base: str,
    modules: tuple[str, ...],
    top: int,
    threshold: float,
    remove: float | None,
    output: Path | None,
    uniform: bool,
    dtype: FloatType,
    allow_loss: bool,
    overwrite: bool,
    dry_run: bool,
    cache: Path | None,
    cache_limit: str,
    no_cache: bool,
    device: str,
    rows: Rows,
    **reading: Unpack[Reading],
) -> None:
    """Find the leading singular directions of W + ΔW that no singular direction of W resembles (arXiv 2410.21228).

    The score of a direction is the largest |cosine| of its left singular vector with those of W; below --threshold it
    is an intruder. Nearly every random direction is one, as the column "chance" says: a low score means spread over
    many directions of W, not unknown to it. No SVD of W + ΔW is taken; that of W is, once, and kept.
    """
    if (remove is None) != (output is None):
        raise click.UsageError("--remove and -o belong together")
    result = intruders(
        adapter,
        base=base,
        modules=modules,
        top=top,
        threshold=threshold,
        remove=remove,
        output=output,
        uniform=uniform,
        dtype=dtype,
        allow_loss=allow_loss,
        overwrite=overwrite,
        dry_run=dry_run,
        cache=cache,
        cache_limit=cache_limit,
        no_cache=no_cache,
        device=device,
        **reading,
    )
    show(result, rows)
