"""The command ``loralens merge``: declares its options, calls the verb and shows the result."""

from pathlib import Path
from typing import Unpack, get_args

import click

from loralens.cli import options
from loralens.cli.show import RowOptions, show
from loralens.merging.rounding import Mode
from loralens.verbs.inputs.adapters import Reading
from loralens.verbs.merge import ModelDtype, merge


@click.command("merge")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:W]...")
@options.base(required=True)
@options.output("OUT", "The folder to write, or the file if the base is a single file.")
@click.option(
    "--undo",
    type=options.PATH,
    metavar="FILE",
    help="Where the undo patch is written; 'none' writes none. [default: into OUT]",
)
@click.option(
    "--certificate",
    type=options.PATH,
    metavar="FILE",
    help="Where the certificate is written; 'none' writes none. [default: into OUT]",
)
@click.option(
    "--measure", is_flag=True, help="Measure how much of every update arrived, even if no certificate is written."
)
@options.rounding(get_args(Mode))
@options.seed("stochastic rounding", least=None)
@click.option(
    "--dtype",
    type=click.Choice(get_args(ModelDtype)),
    default="keep",
    show_default=True,
    help="The dtype of the merged model; 'keep' leaves every tensor in its own.",
)
@click.option("--allow-missing", is_flag=True, help="Leave out modules that have no weight in the base.")
@options.untying(
    "Whether a head that shares the embedding's weight gets a weight of its own. [default: if the adapter needs one]"
)
@options.device(note=options.SAME_BITS)
@options.OVERWRITE
@options.DRY_RUN
@options.MODULES
@options.rows(csv="module")
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
    rows: RowOptions,
    **reading: Unpack[Reading],
) -> None:
    """Merge adapters into a base model, W' = W + Σ w·ΔW, shard by shard and rounded once.

    Every other tensor is copied byte for byte, and so are the files beside the weights. ADAPTER:0.7 has the weight 0.7.
    By default OUT also holds an undo patch, from which `loralens unmerge` restores the base bit for bit, and a
    certificate of how much of every update arrived, which --json prints.
    """
    result = merge(
        *map(options.split_weight, adapters),
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
