"""``loralens survey``: options in, the verb called, its result shown."""

from pathlib import Path

import click

from loralens.cli import options
from loralens.cli.show import Rows, show
from loralens.verbs.survey import survey


@click.command("survey")
@click.argument("folder", metavar="DIR", type=options.PATH)
@options.rows(csv="file")
@options.ALLOW_PICKLE
@options.ONCE
def command(folder: Path, rows: Rows, allow_pickle: bool, once: bool) -> None:
    """One line for each adapter under DIR: format, base, ranks, norms, effective rank, fingerprint, duplicates.

    What should be an adapter and cannot be read gets a line with the reason; whole models are told by their headers
    and only counted. Exit 0 whatever is there.
    """
    show(survey(folder, allow_pickle=allow_pickle, once=once), rows)
