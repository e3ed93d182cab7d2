"""Refuses long options that were written with one dash: click would take ``-output x`` for ``-o utput x``."""

from collections.abc import Sequence

import click


def check_dashes(command: click.Command, words: Sequence[str], ctx: click.Context) -> None:
    """Refuse a long option after one dash, and a short one with ``=``, which would become part of its value.

    Raises
    ------
    UsageError
        A word is such an option; the message says how it is written.
    """
    names = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    for word in words:
        # Words after this one are not options.
        if word == "--":
            return
        option, equals, value = word.partition("=")
        if not option.startswith("-") or option.startswith("--"):
            continue
        # Two letters are a short option, and perhaps its value.
        if len(option) > 2 and f"-{option}" in names:
            raise click.UsageError(f"{option} has two dashes: -{word}", ctx=ctx)
        if equals and option in names:
            raise click.UsageError(f"{word} has no =: write {option} {value}", ctx=ctx)
