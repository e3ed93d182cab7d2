"""Options that the commands of combining share: where the result goes, and how files are read."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from loralens.cli import options
from loralens.verbs.inputs.choices import FLOAT_TYPES
from loralens.verbs.outputs.form import TARGET_FORMATS

Command = Callable[..., None]

BASE_HELP = f"{options.BASE_HELP} For DoRA, and for GGUF."
_WRITING = (
    click.option("-o", "--output", type=click.Path(path_type=Path), metavar="OUT", help="File or folder to write."),
    click.option(
        "--to", type=click.Choice(TARGET_FORMATS), help="The dialect to write. [default: the first adapter's own]"
    ),
    click.option("--base", metavar="MODEL", help=BASE_HELP),
    click.option("--dtype", type=click.Choice(list(FLOAT_TYPES)), help="Of all factors. [default: theirs]"),
    options.ALLOW_LOSS,
    click.option("--overwrite", is_flag=True, help="Replace OUT."),
    click.option("--dry-run", is_flag=True, help="Report, and write nothing."),
    options.rows(csv="One line a module.", json="Machine-readable report."),
)
TAKE_HELP = "Whose heads and biases stand where {} have some; or none."


def take(holders: str) -> Callable[[Command], Command]:
    """``--take``: an adapter whose tensors trained in full stand where ``holders`` have some."""
    return click.option("--take", metavar="ADAPTER", help=TAKE_HELP.format(holders))


DROP_DEAD = click.option("--drop-dead", is_flag=True, help="Leave out modules that come out as 0.")


def writing(function: Command) -> Command:
    """The options of every command that writes an adapter made of others, and those of reading these."""

    @wraps(function)
    def checked(*arguments: Any, output: Path | None, dry_run: bool, **values: Any) -> None:
        if output is None and not dry_run:
            raise click.UsageError("Missing option '-o': say where to write, or give --dry-run")
        function(*arguments, output=output, dry_run=dry_run, **values)

    decorated = options.reading(checked)
    for option in reversed(_WRITING):
        decorated = option(decorated)
    return decorated
