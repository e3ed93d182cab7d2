"""Paths on a command line that are kept as they were typed, and completed by the shell like any other path."""

import click
from click.shell_completion import CompletionItem

PLACES = {"adapter", "adapters", "base", "model", "tuned", "activations", "recipe", "data", "eval"}


class Place(click.types.StringParamType):
    """A string that may be a path: an adapter (``A:0.7`` and a Hub id too), a model, texts."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Leave it to the shell, which knows where files are."""
        del ctx, param
        return [CompletionItem(incomplete, type="file")]


def completing_paths(command: click.Command) -> click.Command:
    """The command, the shell completing files where a plain string of it may be one: arguments, and `PLACES`."""
    for param in command.params:
        if param.type is click.STRING and (isinstance(param, click.Argument) or param.name in PLACES):
            param.type = Place()
    return command
