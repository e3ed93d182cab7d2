"""The command ``loralens report``: declares its options, calls the verb and shows the result."""

from typing import Any

import click

import loralens
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show_json, tell_written
from loralens.cli.terminal import say


@click.command("report")
@click.argument("adapters", nargs=-1, metavar="[ADAPTER...]")
@options.output("FILE", "The HTML page to write, such as reports/x.html.")
@click.option(
    "--fleet",
    type=options.PATH,
    metavar="HOME",
    help="Write the page of a fleet: its index, or the folder that holds .loralens-fleet. Without ADAPTER.",
)
@options.base("Also compare each adapter with its weights.")
@click.option(
    "--activations",
    metavar="FILE",
    multiple=True,
    help=f"{options.ACTIVATIONS_HELP} Each file belongs to the adapter that it was measured with. Repeatable.",
)
@click.option(
    "--evaluations",
    metavar="FILE",
    multiple=True,
    help="A file of `loralens evaluate -o`, whose accuracies or losses then stand at the top of the page. Repeatable.",
)
@options.modules
@click.option(
    "--intruders/--no-intruders",
    default=None,  # the verb estimates the time
    help="Whether to look for intruder dimensions, which takes an SVD of every weight. [default: if it takes at most "
    "about a minute]",
)
@click.option("--markdown", is_flag=True, help="Also write the page as Markdown with pictures, beside FILE.")
# Without --csv and --top: the page has tables of many kinds, and the terminal gets sentences only.
@row_options(verbose="Also print the other sentences of the summary.")
@options.OVERWRITE
@options.reading
def command(adapters: tuple[str, ...], rows: RowOptions, **keywords: Any) -> None:
    """Write one self-contained page about adapters: findings, spectra, ranks, and comparisons; or about a fleet.

    ADAPTER is a file, a folder that holds one, or a Hub id in the local cache. With --base the page also says what ΔW
    amplifies, which dimensions are intruders, and what a merge would lose. The folder of a run stands for its
    checkpoints, and that of a grid of runs for its finished runs.
    """
    if not (adapters or keywords["fleet"]):
        raise click.UsageError("Missing argument 'ADAPTER...': give adapters, or --fleet HOME")
    # The page is the result; only the numbers can be had without it.
    if keywords["output"] is None and not rows.as_json:
        raise click.UsageError(
            "Missing option '-o': say where to write the page, such as -o report.html, or give --json"
        )
    result = loralens.report(*adapters, **keywords)
    if rows.as_json:
        # On standard error, where it does not disturb the JSON.
        for path in result.written:
            tell_written(path)
        show_json(result.record())
        return
    say(*result.conclusion(), *(result.document.summary[1:] if rows.verbose else ()))
