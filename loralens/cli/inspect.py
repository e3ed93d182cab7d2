"""The command ``loralens inspect``: declares its options, calls the verb and shows the result."""

from typing import Any

import click

from loralens.cli import options
from loralens.cli.show import RowOptions, show
from loralens.verbs.inspect import inspect


class ConsumerType(click.Choice[str]):
    """The programs whose rules are known, looked up when needed: the rules take as long to import as click."""

    def __init__(self) -> None:
        # click's own constructor would ask for the choices.
        self.case_sensitive = True

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]  # where click has an attribute
        """The names of the programs."""
        from loralens.analysis.clients.rules import CONSUMERS

        return tuple(CONSUMERS)


@click.command("inspect")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@options.MODULES
@options.base("Say how the names match its weights, of which only headers are read.")
@click.option(
    "--consumer",
    "--for",
    "consumer",
    type=ConsumerType(),
    help="Say what this program rejects or ignores. Exit with code 1 if it rejects the adapter or applies it wrongly.",
)
@options.rows(csv="module")
@options.reading
def command(adapters: tuple[str, ...], rows: RowOptions, **keywords: Any) -> None:
    """Show what is in an adapter file: format, base, modules, scales and their source, other tensors, warnings.

    ADAPTER is a file, a folder that holds one, or a Hub id in the local cache.
    """
    result = inspect(*adapters, **keywords)
    if rows.as_json or rows.as_csv:
        show(result, rows)
    else:
        # One after the other, so that the findings of an adapter are below its own tables.
        for adapter in result.adapters:
            show(adapter, rows)
    if result.answer is False:
        click.get_current_context().exit(1)
