"""The command ``loralens survey``: declares its options, calls the verb and shows the result."""

from pathlib import Path
from typing import Any

import click

import loralens
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


@click.command("survey")
@click.argument("folder", metavar="DIR", type=options.PATH)
@row_options(csv="file")
# `options.reading` does not fit: one format or one scale would be wrong for most files of a folder.
@options.ONCE
def command(folder: Path, rows: RowOptions, **keywords: Any) -> None:
    """List the adapters under a folder: format, base, ranks, norms, effective rank, fingerprint, duplicates.

    A file that should be an adapter and cannot be read is listed with the reason. Whole models are recognised by their
    headers, and only counted. The exit code is 0 whatever is there.
    """
    show(loralens.survey(folder, **keywords), rows)
