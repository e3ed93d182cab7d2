"""``loralens merge``: options in, the verb called, its result shown."""

from pathlib import Path
from typing import Unpack, get_args

import click

from loralens.cli import options
from loralens.cli.show import Rows, show
from loralens.merging.rounding import Mode
from loralens.verbs.inputs.adapters import Reading
from loralens.verbs.merge import ModelDtype, merge

PATH = click.Path(path_type=Path)


@click.command("merge")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:W]...")
@click.option("--base", required=True, metavar="MODEL", help=options.BASE_HELP)
@click.option("-o", "--output", type=PATH, metavar="OUT", help="Folder to write (a file where the base is one file).")
@click.option("--undo", type=PATH, metavar="FILE", help="Where the undo patch goes, or 'none'. [default: in OUT]")
@click.option(
    "--certificate", type=PATH, metavar="FILE", help="Where the certificate goes, or 'none'. [default: in OUT]"
)
@click.option("--measure", is_flag=True, help="Measure what arrives where no certificate is written, too.")
@click.option("--rounding", type=click.Choice(get_args(Mode)), default="nearest", show_default=True)
@click.option("--seed", type=int, default=0, help="Of stochastic rounding.")
@click.option("--dtype", type=click.Choice(get_args(ModelDtype)), default="keep", help="Dtype of the merged model.")
@click.option("--allow-missing", is_flag=True, help="Leave out modules that have no weight in the base.")
@options.untying(
    "Whether a head that shares the embedding's weight gets one of its own. [default: as the adapter needs]"
)
@options.DEVICE
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@click.option("--dry-run", is_flag=True, help="Say what would arrive, and write nothing.")
@options.MODULES
@options.rows(csv="One line a module.", json="The certificate on stdout.")
@options.reading
def command(
    adapters: tuple[str, ...],
    base: str,
    output: Path | None,
    undo: Path | None,
    certificate: Path | None,
    measure: bool,
    rounding: Mode,
    seed: int,
    dtype: ModelDtype,
    allow_missing: bool,
    untie: bool | None,
    device: str,
    overwrite: bool,
    dry_run: bool,
    modules: tuple[str, ...],
    rows: Rows,
    **reading: Unpack[Reading],
) -> None:
    """Merge adapters into a base model: W' = W + Σ w·ΔW, shard by shard, rounded once.

    ADAPTER:0.7 counts 0.7 times. Every other tensor is copied byte for byte, and the files beside the weights come
    along. Unless told otherwise OUT holds an undo patch, from which `loralens unmerge` restores the base bit for bit,
    and a certificate of how much of every update arrived.
    """
    result = merge(
        *map(options.weighted, adapters),
        base=base,
        output=output,
        undo=undo,
        certificate=certificate,
        measure=measure or rows.as_json or rows.as_csv,  # without a number there would be nothing to show
        rounding=rounding,
        seed=seed,
        dtype=dtype,
        allow_missing=allow_missing,
        untie=untie,
        device=device,
        overwrite=overwrite,
        dry_run=dry_run,
        modules=modules,
        **reading,
    )
    show(result, rows)
