"""Paste what every command says of itself (``--help``), and the signature of its function, into its page.

    python docs/usage.py            # write
    python docs/usage.py --check    # exit 1 where a page is missing, or no longer says what the command says

A page is docs/commands/NAME.md; both stand between two comments, ``<!-- usage -->`` and ``<!-- /usage -->``.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from inspect import Parameter, signature
from pathlib import Path

import click

import loralens
from loralens.cli.fleet import SUBCOMMANDS
from loralens.cli.overview import COMMANDS
from loralens.verbs import VERBS

PAGES = Path(__file__).parent / "commands"
BLOCK = re.compile(r"<!-- usage -->\n.*?<!-- /usage -->", re.DOTALL)
WIDTH = 100  # columns, as wide on every machine
PYTHON = (
    "The function of the same name has the same options ([all functions](../api/index.md)). Its result has "
    "`to_frame()`, `to_latex()`, `to_csv()` and `record()`."
)


def help_text(*command: str) -> str:
    """What ``loralens COMMAND --help`` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "loralens", *command, "--help"],
        env=os.environ | {"COLUMNS": str(WIDTH + 2), "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise click.ClickException(f"loralens {' '.join(command)} --help ends with {done.returncode}: {done.stderr}")
    return done.stdout.rstrip()


def call(verb: str) -> str:
    """The signature of a verb, options that travel together written out."""
    function = getattr(loralens, verb)
    parts, line, lines = [*arguments(function)], "", []
    for part in parts:
        if len(line) + len(part) > WIDTH - 4:
            lines.append(line.rstrip())
            line = ""
        line += f"{part}, "
    lines.append(line.rstrip(", "))
    return f"loralens.{verb}(\n    " + "\n    ".join(lines) + "\n)"


def arguments(function: object) -> Iterator[str]:
    """``name`` or ``name=default`` for every argument of a function."""
    assert callable(function)
    for name, parameter in signature(function).parameters.items():
        if parameter.kind is Parameter.VAR_POSITIONAL:
            yield f"*{name}"
        else:
            yield name if parameter.default is Parameter.empty else f"{name}={parameter.default!r}"


def usage(command: str) -> str:
    """The block for a command: its ``--help``, and the function of the same name."""
    blocks = [f"```text\n{help_text(command)}\n```"]
    if command == "fleet":
        blocks += [f"```text\n{help_text(command, name)}\n```" for name in SUBCOMMANDS]
    if command in VERBS:
        # The heading stands in the block, so that the page goes on with an example in Python.
        blocks.append(f"## Python\n\n{PYTHON}\n\n```text\n{call(command)}\n```")
    return "<!-- usage -->\n\n" + "\n\n".join(blocks) + "\n\n<!-- /usage -->"


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
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = dict(
            zip(pages, pool.map(lambda page: pasted(page.read_text(encoding="utf-8"), pages[page]), pages), strict=True)
        )
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
