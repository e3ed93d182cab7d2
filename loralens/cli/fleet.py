"""The command ``loralens fleet``: a group whose sub-commands are imported when they run."""

from importlib import import_module

import click

# Name → the module in `loralens.cli.fleets` with ``command_NAME``, and the line in the help of the group.
SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "near": ("near", "Find the adapters that are most like an example."),
    "copies": ("groups", "Find copies, and the files that can be deleted."),
    "runs": ("groups", "Group the adapters that began from the same random A."),
    "families": ("groups", "Group the adapters whose updates are alike."),
    "bases": ("bases", "Show which base model each adapter is for."),
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

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sub-commands without an import of them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in SUBCOMMANDS.items()])


@click.group("fleet", cls=FleetGroup)
def command() -> None:
    """Index a collection of adapters, and search and group it."""
