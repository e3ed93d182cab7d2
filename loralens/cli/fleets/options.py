"""The option that sub-commands of `loralens fleet` share."""

import click

from loralens.cli import options

FLEET = click.option(
    "--fleet",
    type=options.PATH,
    default=".",
    metavar="HOME",
    help="The index, or the folder that holds .loralens-fleet.  [default: the current folder]",
)
