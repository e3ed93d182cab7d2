"""The command ``loralens fleet``: a group whose sub-commands are imported when they run."""

from importlib import import_module

import click

from loralens.cli.dashes import check_dashes
from loralens.errors import visible

# Name → the module in `loralens.cli.fleets` with ``command_NAME``, and the line in the help of the group.
SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "index": ("catalogue", "Make or update the index of all adapters under a folder."),
    "near": ("near", "Find the adapters that are most like an example."),
    "copies": ("groups", "Find copies, and the files that can be deleted."),
    "runs": ("groups", "Group the adapters that began from the same random A."),
    "families": ("groups", "Group the adapters whose updates are alike."),
    "bases": ("bases", "Show which base model each adapter is for."),
    "empty": ("catalogue", "List the adapters that change no weight."),
    "stats": ("catalogue", "Count adapters, ranks and dialects."),
    "rows": ("catalogue", "Show what the catalogue answers to a SELECT."),
}


class FleetGroup(click.Group):
    """Loads a sub-command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order of the table."""
        del ctx
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the sub-command."""
        del ctx
        if cmd_name not in SUBCOMMANDS:
            return None
        command = getattr(import_module(f"loralens.cli.fleets.{SUBCOMMANDS[cmd_name][0]}"), f"command_{cmd_name}")
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The sub-command of the first word, whose options are checked as those of a command."""
        if args and args[0] not in SUBCOMMANDS and not ctx.resilient_parsing:
            from difflib import get_close_matches  # takes 5 ms to import

            near = get_close_matches(args[0], SUBCOMMANDS, 1)
            if near and not args[0].startswith("-"):
                ctx.fail(f"No such command '{visible(args[0])}'. Did you mean '{near[0]}'?")
        name, command, arguments = super().resolve_command(ctx, args)
        if command and not ctx.resilient_parsing:
            check_dashes(command, arguments, click.Context(command, ctx, info_name=name))
        return name, command, arguments

    def invoke(self, ctx: click.Context) -> object:
        """Run the sub-command; a folder that is given as to ``index`` is answered by the option that takes it."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            options = [word for option in error.ctx.command.params for word in option.opts] if error.ctx else []
            if not error.message.startswith("Got unexpected extra argument") or "--fleet" not in options:
                raise
            hint = "The index, or the folder that holds it, is given as --fleet DIR."
            raise click.UsageError(f"{error.message}. {hint}", error.ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sub-commands without an import of them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in SUBCOMMANDS.items()])


@click.group("fleet", cls=FleetGroup)
def command() -> None:
    """Index thousands of adapters, and search and group them.

    The index holds a catalogue of the files and a sketch of every update. All questions are answered from it, and files
    are read again only where exact numbers are needed.
    """
