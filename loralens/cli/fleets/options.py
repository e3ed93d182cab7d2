"""The options that sub-commands of `loralens fleet` share."""

from collections.abc import Callable, Mapping
from typing import Any

import click

from loralens.cli import options

FLEET = click.option(
    "--fleet",
    type=options.PATH,
    default=".",
    metavar="HOME",
    help="The index, or the folder that holds .loralens-fleet.  [default: the current folder]",
)


def workers(task: str, *, default: str) -> Callable[[options.Command], options.Command]:
    """The options ``--jobs`` and ``--dask``: ``task`` is what the workers do, ``default`` who does it without them."""

    def decorate(function: options.Command) -> options.Command:
        jobs = click.option(
            "--jobs",
            "-j",
            type=options.COUNT,
            metavar="N",
            help=f"{task.capitalize()} in N processes.  [default: {default}]",
        )
        text = f"{task.capitalize()} on the workers of this Dask scheduler; they need the disk."
        return options.decorate(function, [jobs, click.option("--dask", metavar="ADDRESS", help=text)])

    return decorate


def check_workers(keywords: Mapping[str, Any]) -> None:
    """Refuse ``--jobs`` together with ``--dask``."""
    if keywords["dask"] and keywords["jobs"]:
        raise click.UsageError("--jobs and --dask exclude each other: the workers of Dask are as many as were started")
