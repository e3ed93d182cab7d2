"""Paste the ``--help`` of every command, and the signature of its function, into the page of the command.

    python docs/usage.py            # write
    python docs/usage.py --check    # exit 1 where a page is missing, or no longer shows what the command prints

A page is docs/commands/NAME.md. Both texts stand between two comments, ``<!-- usage -->`` and ``<!-- /usage -->``. The
commands are run as users run them, and their names too are read from ``loralens --help``.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from inspect import Parameter, signature
from pathlib import Path

import click

import loralens
from loralens.verbs import VERBS

PAGES = Path(__file__).parent / "commands"
BLOCK = re.compile(r"<!-- usage -->\n.*?<!-- /usage -->", re.DOTALL)
WIDTH = 100  # columns, the same on every machine
# In the help of a group of commands: the heading of a section, and the row of a command, which may go on in a further
# line that is indented more deeply.
HEADING = re.compile(r"(\S.*):")
ROW = re.compile(r"  ([a-z]+)  +(\S.*)")
CONTINUATION = re.compile(r"    +(\S.*)")
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


def commands_of(help_of_group: str) -> dict[str, dict[str, str]]:
    """The commands that the help of a group lists: heading of a section → name of a command → what the command does."""
    sections: dict[str, dict[str, str]] = {}
    name = ""
    for line in help_of_group.splitlines():
        if heading := HEADING.fullmatch(line):
            section, name = sections.setdefault(heading[1], {}), ""
        elif sections and (row := ROW.fullmatch(line)):
            name = row[1]
            section[name] = row[2]
        elif name and (more := CONTINUATION.fullmatch(line)):
            section[name] += f" {more[1]}"
    return {heading: commands for heading, commands in sections.items() if commands}


def signature_text(verb: str) -> str:
    """The signature of a verb, with every option that it takes as a keyword."""
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
        (subcommands,) = commands_of(help_text(command)).values()
        blocks += [f"```text\n{help_text(command, name)}\n```" for name in subcommands]
    if command in VERBS:
        # The heading stands in the block, so that the page goes on with an example in Python.
        blocks.append(f"## Python\n\n{PYTHON}\n\n```text\n{signature_text(command)}\n```")
    return "<!-- usage -->\n\n" + "\n\n".join(blocks) + "\n\n<!-- /usage -->"


def with_usage(text: str, command: str) -> str:
    """The text of a page, with the usage of today in place of the one that it has."""
    if len(BLOCK.findall(text)) != 1:
        raise click.ClickException(
            f"docs/commands/{command}.md needs one <!-- usage --> and one <!-- /usage --> behind it"
        )
    return BLOCK.sub(lambda _: usage(command), text)


def index(sections: Mapping[str, Mapping[str, str]]) -> str:
    """The table of all commands for docs/commands/index.md, in the sections of ``loralens --help``."""
    rows = [
        f"| {'' if number else heading} | [`{name}`]({name}.md) | {text} |"
        for heading, commands in sections.items()
        for number, (name, text) in enumerate(commands.items())
    ]
    return "\n".join(["<!-- usage -->\n", "| | command | |", "| --- | --- | --- |", *rows, "\n<!-- /usage -->"])


def expected_pages() -> dict[Path, str]:
    """Every page of a command and what it should contain; a missing page is an error."""
    sections = commands_of(help_text())
    pages = {PAGES / f"{command}.md": command for commands in sections.values() for command in commands}
    missing = [page.name for page in pages if not page.is_file()]
    if missing:
        raise click.ClickException(f"no page in docs/commands: {', '.join(missing)}")
    orphans = sorted({page.name for page in PAGES.glob("*.md")} - {page.name for page in pages} - {"index.md"})
    if orphans:
        raise click.ClickException(f"no such command, but a page in docs/commands: {', '.join(orphans)}")
    # A command is a process of its own, and most of its time is the start of Python.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = pool.map(lambda page: with_usage(page.read_text(encoding="utf-8"), pages[page]), pages)
        expected = dict(zip(pages, texts, strict=True))
    overview = PAGES / "index.md"
    return expected | {overview: BLOCK.sub(lambda _: index(sections), overview.read_text(encoding="utf-8"))}


def run(*, check: bool) -> int:
    """Write the pages, or name those that are not as they should be."""
    stale = {page: text for page, text in expected_pages().items() if page.read_text(encoding="utf-8") != text}
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
