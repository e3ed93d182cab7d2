"""The ``--help`` of every command and the signature of its function, for the pages of commands when they are built."""

from inspect import Parameter, signature

import click

import loralens
from loralens.arithmetic.methods import METHODS
from loralens.cli.main import main
from loralens.verbs import GROUPS, VERBS

MARK = "<!-- usage -->"  # where a page of docs/commands shows it
WIDTH = 100  # columns


def usage(page: str) -> str:
    """What is shown on the page of a command, or on the page ``index``."""
    if page == "index":
        rows = [
            f"| {'' if number else heading} | [`{name}`]({name}.md) | {line} |"
            for heading, names in GROUPS.items()
            for number, (name, line) in enumerate(names.items())
        ]
        return "\n".join(["| | command | |", "| --- | --- | --- |", *rows])
    group = click.Context(main, info_name="loralens", terminal_width=WIDTH)
    command = main.get_command(group, page)
    assert command is not None
    context = click.Context(command, group, info_name=page)
    blocks = [command.get_help(context)]
    if isinstance(command, click.Group):
        parts = [(name, command.get_command(context, name)) for name in command.list_commands(context)]
        blocks += [part.get_help(click.Context(part, context, info_name=name)) for name, part in parts if part]
    texts = [f"```text\n{block}\n```" for block in blocks]
    if page in VERBS:
        texts.append(f"```text\n{_signature_text(page)}\n```")
    if page == "combine":
        rows = [f"| `{row.name}` | {row.text} | {row.paper} |" for row in METHODS.values()]
        texts.append("\n".join(["| `--method` | what it does | source |", "| --- | --- | --- |", *rows]))
    texts.append("The examples use the [playground](../index.md) with `chat`, `code`, `base` and the others.")
    return "\n\n".join(texts)


def _signature_text(verb: str) -> str:
    """The signature of a verb, with every option that it takes as a keyword."""
    line, lines = "", []
    for name, parameter in signature(getattr(loralens, verb)).parameters.items():
        star = "*" if parameter.kind is Parameter.VAR_POSITIONAL else ""
        default = "" if star or parameter.default is Parameter.empty else f"={parameter.default!r}"
        part = f"{star}{name}{default}"
        if len(line) + len(part) > WIDTH - 4:
            lines.append(line.rstrip())
            line = ""
        line += f"{part}, "
    lines.append(line.rstrip(", "))
    return f"loralens.{verb}(\n    " + "\n    ".join(lines) + "\n)"
