"""The command ``loralens doctor``: declares its options, calls the verb and shows the result."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click

import loralens
from loralens.choices import Consumer, Level, MergeDType, PredictedRounding
from loralens.cli import options
from loralens.cli.several import lines_shown, show_answer
from loralens.cli.show import RowOptions, row_options, tell_written


@click.command("doctor")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@options.output("DIR", "Examine the adapters one by one, and write the findings of each into this folder, as JSON.")
@options.base("Also check the adapters against its weights.")
@options.modules
@click.option(
    "--dtype",
    type=click.Choice(get_args(MergeDType)),
    help="The dtype of the merged model whose rounding is predicted. [default: the dtypes of the base]",
)
@options.rounding(get_args(PredictedRounding))
@click.option(
    "--consumer",
    "--for",
    "consumer",
    type=click.Choice(get_args(Consumer)),
    help="Also find what this program rejects or ignores.",
)
@click.option(
    "--sarif", type=options.PATH, metavar="FILE", help="Also write the findings to FILE as SARIF 2.1.0, for CI systems."
)
@click.option(
    "--fail-on",
    type=click.Choice(get_args(Level)),
    help="Exit with code 1 if there is a finding of this level or a more serious one.",
)
@options.OVERWRITE
@options.JOBS
@row_options(csv="finding")
@options.reading
def command(adapters: tuple[str, ...], sarif: Path | None, rows: RowOptions, **keywords: Any) -> None:
    """Examine adapters for faults: list the findings, most serious first, each with its evidence and its remedy.

    ADAPTER is a file, a folder that holds one, or a Hub id in the local cache. Several adapters are also compared with
    each other. A file that cannot be read is a finding too. The exit code is 0 whatever is found, unless --fail-on is
    given. How a merge with error feedback would round is known only from merging, so --rounding does not offer it.

    The adapters in a folder that is not an adapter itself, or any adapters with -o, are examined one by one, with one
    line for each; the exit code is then 2 if one of them cannot be read. With -o, an adapter whose file exists is
    skipped, and its findings are those in the file, unless --overwrite is given.
    """
    # Imported here, since the help of a command starts no NumPy.
    from loralens.verbs.spectra.doctor import DoctorResult

    with lines_shown(rows):
        result = loralens.doctor(*adapters, sarif=sarif, **keywords)
    if sarif:
        tell_written(sarif)
    if isinstance(result, DoctorResult):
        # Evidence and remedies are printed as sentences and not as rows, so the result itself applies --top.
        modules_told = None if rows.verbose else result.modules_told
        result = replace(result, causes_told=rows.top, modules_told=modules_told)
    show_answer(result, rows, several=not isinstance(result, DoctorResult))
