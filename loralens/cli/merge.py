"""The command ``loralens merge``: declares its options, calls the verb and shows the result."""

from typing import Any, get_args

import click

import loralens
from loralens.choices import MergeBits, ModelDtype, RoundingMode
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


@click.command("merge")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:W]...")
@options.base(required=True)
@options.output("OUT", "The folder to write, or the file if the base is a single file, such as a GGUF file.")
@click.option(
    "--undo",
    type=options.PATH,
    metavar="FILE",
    help="Where the undo patch is written; 'none' writes none. [default: undo.loralens in OUT; for a file OUT.gguf "
    "OUT.undo.loralens]",
)
@click.option(
    "--certificate",
    type=options.PATH,
    metavar="FILE",
    help="Where the certificate is written; 'none' writes none. [default: merge_certificate.json in OUT; for a file "
    "OUT.gguf OUT.merge_certificate.json]",
)
@click.option(
    "--measure", is_flag=True, help="Measure how much of every update arrived, even if no certificate is written."
)
@click.option(
    "--rounding",
    type=click.Choice(get_args(RoundingMode)),
    help="How a merge rounds the new weights. [default: nearest; stochastic with --bits keep]",
)
# Negative seeds too: the seed is hashed, so that any whole number will do.
@options.seed("stochastic rounding", least=None)
@click.option(
    "--dtype",
    type=click.Choice(get_args(ModelDtype)),
    default="keep",
    show_default=True,
    help="The dtype of the merged model; 'keep' leaves every tensor in its own.",
)
@click.option(
    "--bits",
    type=click.Choice(get_args(MergeBits)),
    help="The codes of the merged model: 'keep' keeps the format and the scales of a low-bit base, and changes only "
    "codes. The other values merge in floats and quantise once: 'nf4' is for a base in safetensors, 'q4_1' and 'q8_0' "
    "are for a GGUF base. A low-bit base needs this or --dtype.",
)
@click.option(
    "--data",
    type=options.PATH,
    metavar="FILE",
    help="Texts of the adapter's domain. The certificate then gives the loss of the merged model, and its divergence "
    "from the base with the unmerged adapter.",
)
# By default such a module is an error: the merged model would lack a part of the adapter.
@click.option("--allow-missing", is_flag=True, help="Leave out modules that have no weight in the base.")
@options.untying(
    "Whether a head that shares the embedding's weight gets a weight of its own. [default: if the adapter needs one]"
)
@options.device(note=options.SAME_BITS)
@options.OVERWRITE
@options.DRY_RUN
@options.modules
@row_options(csv="module")
@options.reading
def command(adapters: tuple[str, ...], measure: bool, rows: RowOptions, **keywords: Any) -> None:
    """Merge adapters into a base model, W' = W + Σ w·ΔW, shard by shard and rounded once.

    Every other tensor is copied byte for byte, and so are the files beside the weights. ADAPTER:0.7 has the weight 0.7.
    By default OUT also holds an undo patch, from which `loralens unmerge` restores the base bit for bit, and a
    certificate of how much of every update arrived, which --json prints.
    """
    # Without a measurement there would be nothing to show as JSON or CSV.
    measure = measure or rows.as_json or rows.as_csv
    show(loralens.merge(*map(options.split_weight, adapters), measure=measure, **keywords), rows)
