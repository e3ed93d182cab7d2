"""``loralens report``: options in, the verb called, its page written, its numbers shown."""

from pathlib import Path
from typing import Unpack

import click

from loralens.cli import options
from loralens.cli.show import show_json, wrote
from loralens.verbs.inputs.adapters import Reading
from loralens.verbs.report import report


@click.command("report")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="The page to write: reports/x.html."
)
@click.option("--base", metavar="MODEL", help="Also hold each adapter against it. " + options.BASE_HELP)
@click.option(
    "--activations",
    metavar="FILE",
    multiple=True,
    help="What real inputs excite, as `loralens calibrate` measured it, each file for its adapter. Repeatable.",
)
@options.MODULES
@click.option(
    "--intruders/--no-intruders",
    default=None,
    help="Look for intruder dimensions, which takes an SVD of every weight. [default: where a minute will do]",
)
@click.option("--markdown", is_flag=True, help="Also write it as Markdown, with pictures, beside it.")
@click.option("--json", "as_json", is_flag=True, help="Print the same numbers, machine-readable.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@options.reading
def command(
    adapters: tuple[str, ...],
    output: Path | None,
    base: str | None,
    activations: tuple[str, ...],
    modules: tuple[str, ...],
    intruders: bool | None,
    markdown: bool,
    as_json: bool,
    overwrite: bool,
    **reading: Unpack[Reading],
) -> None:
    """Put what can be said about adapters on one self-contained page: findings, spectra, ranks, and how they compare.

    ADAPTER is a file, a folder that holds one, or a Hub id in the local cache; a run's folder stands for its
    checkpoints. With --base also what ΔW amplifies, intruder dimensions, and what a merge would lose.
    """
    if output is None and not as_json:
        raise click.UsageError("Missing option '-o': say where to write the page, or give --json")
    result = report(
        *adapters,
        output=output,
        base=base,
        activations=activations,
        modules=modules,
        intruders=intruders,
        markdown=markdown,
        overwrite=overwrite,
        **reading,
    )
    for path in result.written:
        wrote(path)
    if as_json:
        show_json(result.record())
