"""``loralens extract``: options in, the verb called, its result shown."""

from pathlib import Path
from typing import Unpack, get_args

import click

from loralens.cli import compress_rule, options
from loralens.cli.show import Rows, show
from loralens.verbs.extract import FORMATS, Noise, extract
from loralens.verbs.inputs.choices import FLOAT_TYPES, FloatType
from loralens.verbs.outputs.form import TargetFormat
from loralens.verbs.outputs.rules import RankRules


@click.command("extract")
@click.option("--base", required=True, metavar="MODEL", help=options.BASE_HELP)
@click.option("--tuned", required=True, metavar="MODEL", help="The tuned or merged model, in the same forms.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="TARGET", help="File or folder to write.")
@compress_rule.rules
@click.option(
    "--noise-edge",
    type=click.Choice(get_args(Noise)),
    is_flag=False,
    flag_value="rounding",
    help="Keep what stands above the noise: that of rounding to the dtype of --tuned, or where it is unknown and the "
    "difference full-rank, as the median of all singular values tells it.  [alone: rounding]",
)
@click.option("--uniform", is_flag=True, help="One rank everywhere: what LoRAX and mlx-lm want.")
@click.option("--exact", is_flag=True, help="Dense SVDs in float64, for big matrices too: slow.")
@click.option("--to", type=click.Choice(FORMATS), default="peft", show_default=True, help="The dialect to write.")
@click.option("--dtype", type=click.Choice(list(FLOAT_TYPES)), default="f32", show_default=True)
@options.MODULES
@click.option("--drop-extra", is_flag=True, help="Leave out what is no matrix: norms, biases, new heads.")
@click.option("--overwrite", is_flag=True, help="Replace TARGET.")
@click.option("--dry-run", is_flag=True, help="Report, and write nothing.")
@options.rows(csv="One line a module.", json="Machine-readable report.")
def command(
    base: str,
    tuned: str,
    output: Path | None,
    noise_edge: Noise | None,
    uniform: bool,
    exact: bool,
    to: TargetFormat,
    dtype: FloatType,
    modules: tuple[str, ...],
    drop_extra: bool,
    overwrite: bool,
    dry_run: bool,
    rows: Rows,
    **rules: Unpack[RankRules],
) -> None:
    """Make an adapter from what --tuned has and --base has not: of a full fine-tune, or a merge by another tool.

    Give one rule of ranks, as to compress, or --noise-edge. Every weight matrix that differs becomes a pair, embeddings
    only where --modules asks for them ('*' for all). Norms, biases and new heads ride along in full. Whatever differs
    and is not in the adapter is named. Names are those of --tuned; for PEFT those that transformers 5 has in memory.
    """
    options.require_output(output, dry_run=dry_run)
    result = extract(
        base,
        tuned,
        output=output,
        noise_edge=noise_edge,
        uniform=uniform,
        exact=exact,
        to=to,
        dtype=dtype,
        modules=modules,
        drop_extra=drop_extra,
        overwrite=overwrite,
        dry_run=dry_run,
        **rules,
    )
    show(result, rows)
