"""Paths on the command line: the shell completes them, and an empty one is refused.

`pathlib.Path` takes an empty text for the current directory, which nobody means who writes ``-o "$OUT"`` and has not
set the variable.
"""

from typing import Any

import click
from click.shell_completion import CompletionItem

EMPTY = "is empty; a variable of the shell may not be set"


class FilledPath(click.Path):
    """A path that is not empty."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path as a value of ``path_type``."""
        if value == "":
            self.fail(EMPTY, param, ctx)
        return super().convert(value, param, ctx)


class PathType(click.types.StringParamType):
    """A string that may be a path, such as an adapter (also ``A:0.7`` or a Hub id), a model, or texts."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The string as it is."""
        if value == "":
            self.fail(EMPTY, param, ctx)
        return super().convert(value, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Let the shell complete the names of files."""
        del ctx, param
        return [CompletionItem(incomplete, type="file")]
