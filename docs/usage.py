"""Paste what every command says of itself (``--help``) into its page.

    python docs/usage.py            # write
    python docs/usage.py --check    # exit 1 where a page is missing, or no longer says what the command says

A page is docs/commands/NAME.md; the usage stands between two comments, ``<!-- usage -->`` and ``<!-- /usage -->``.
"""

import re
import sys
from pathlib import Path

import click
from click.testing import CliRunner

from loralens.cli.main import COMMANDS, main

PAGES = Path(__file__).parent / "commands"
BLOCK = re.compile(r"<!-- usage -->\n.*?<!-- /usage -->", re.DOTALL)
WIDTH = 110


def usage(command: str) -> str:
    """The block for a command: its ``--help``, as wide on every machine."""
    said = CliRunner().invoke(
        main, [command, "--help"], prog_name="loralens", terminal_width=WIDTH, max_content_width=WIDTH
    )
    if said.exit_code:
        raise click.ClickException(f"loralens {command} --help ends with {said.exit_code}: {said.output}")
    return f"<!-- usage -->\n\n```text\n{said.output.rstrip()}\n```\n\n<!-- /usage -->"


def pasted(text: str, command: str) -> str:
    """A page with the usage of today in it."""
    if len(BLOCK.findall(text)) != 1:
        raise click.ClickException(
            f"docs/commands/{command}.md needs one <!-- usage --> and one <!-- /usage --> behind it"
        )
    return BLOCK.sub(lambda _: usage(command), text)


def index() -> str:
    """The table of commands for docs/commands/index.md: a line each, and where its page is."""
    rows = [f"| [`{name}`]({name}.md) | {text} |" for name, text in COMMANDS.items()]
    return "\n".join(["<!-- usage -->\n", "| command | |", "| --- | --- |", *rows, "\n<!-- /usage -->"])


def wanted() -> dict[Path, str]:
    """Every page of a command and what it should hold; a missing page is an error."""
    pages = {PAGES / f"{command}.md": command for command in COMMANDS}
    missing = [page.name for page in pages if not page.is_file()]
    if missing:
        raise click.ClickException(f"no page in docs/commands: {', '.join(missing)}")
    orphans = sorted({page.name for page in PAGES.glob("*.md")} - {page.name for page in pages} - {"index.md"})
    if orphans:
        raise click.ClickException(f"no such command, but a page in docs/commands: {', '.join(orphans)}")
    texts = {page: pasted(page.read_text(encoding="utf-8"), command) for page, command in pages.items()}
    overview = PAGES / "index.md"
    return texts | {overview: BLOCK.sub(lambda _: index(), overview.read_text(encoding="utf-8"))}


def run(*, check: bool) -> int:
    """Write the pages, or say which of them are not as they should be."""
    stale = {page: text for page, text in wanted().items() if page.read_text(encoding="utf-8") != text}
    for page, text in stale.items():
        if not check:
            page.write_text(text, encoding="utf-8")
        click.echo(f"{'stale' if check else 'wrote'}: docs/commands/{page.name}", err=check)
    if check and stale:
        click.echo("  fix: python docs/usage.py", err=True)
    return int(check and bool(stale))


if __name__ == "__main__":
    try:
        sys.exit(run(check="--check" in sys.argv[1:]))
    except click.ClickException as error:
        error.show()
        sys.exit(1)
