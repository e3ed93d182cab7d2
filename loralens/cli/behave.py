"""The command ``loralens behave``: declares its options, calls the verb and shows the result."""

from typing import Any

import click

import loralens
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


def _store(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> None:
    """Store the values of ``--adapters``, an older spelling of the argument, until the argument is processed."""
    del param
    ctx.meta["adapters"] = value


def _join_spellings(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """The adapters in both spellings, of which there must be at least one."""
    # In the order of the words `--adapters A B`, where click takes only A as the value of the option.
    adapters = (*ctx.meta.get("adapters", ()), *value)
    if not adapters:
        raise click.MissingParameter(ctx=ctx, param=param)
    return adapters


@click.command("behave")
@click.argument("adapters", nargs=-1, metavar="ADAPTER...", callback=_join_spellings)
# Eager, so that it is processed before the argument; hidden, so that the help has one spelling.
@click.option("--adapters", "older", multiple=True, hidden=True, is_eager=True, expose_value=False, callback=_store)
@options.running
@row_options(csv="pair of versions")
@options.reading
def command(adapters: tuple[str, ...], rows: RowOptions, **keywords: Any) -> None:
    """Show what each adapter does to the outputs of its base on real inputs, and how far adapters are apart.

    Differences of hidden states are always measured; KL divergence and differences of logits where the model has a
    head. Updates are added in float32, and nothing is merged.

    `--adapters A B` means the same as A B.
    """
    show(loralens.behave(*adapters, **keywords), rows)
