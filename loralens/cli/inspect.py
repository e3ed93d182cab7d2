"""The command ``loralens inspect``: declares its options, calls the verb and shows the result."""

from shlex import quote
from typing import Any, get_args

import click

import loralens
from loralens.choices import Consumer
from loralens.cli import options
from loralens.cli.overview import WITHOUT_VERB, next_steps
from loralens.cli.show import RowOptions, row_options, show, show_tables, wrap_sentences
from loralens.cli.terminal import say


@click.command("inspect")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@options.modules
@options.base("Say how the names match its weights, of which only headers are read.")
@click.option(
    "--consumer",
    "--for",
    "consumer",
    type=click.Choice(get_args(Consumer)),
    help="Say what this program rejects or ignores. Exit with code 1 if there is any error.",
)
@row_options(csv="module")
@options.reading
def command(adapters: tuple[str, ...], rows: RowOptions, **keywords: Any) -> None:
    """Show what is in an adapter file: format, base, modules, scales and their source, other tensors, warnings.

    ADAPTER is a file, a folder that holds one, or a Hub id in the local cache.
    """
    result = loralens.inspect(*adapters, **keywords)
    if rows.as_json or rows.as_csv:
        show(result, rows)
    else:
        # One after the other, so that the findings of an adapter are below its own tables.
        for adapter in result.adapters:
            show(adapter, rows)
            if rows.verbose:
                show_tables(*adapter.listing())
        if WITHOUT_VERB in click.get_current_context().meta and not rows.quiet:
            # Tables end with an empty line, and findings do not.
            say(*([""] if result.adapters[-1].sentences() else []), *wrap_sentences([next_steps(quote(adapters[0]))]))
    # None without --consumer: then nothing was asked that could be answered with no.
    if result.answer is False:
        click.get_current_context().exit(1)
