"""Makes a click command of a function: of its signature and its numpydoc text, read from its source.

The function is not imported, because verbs import NumPy, and ``--help`` would take a second. A parameter whose type is
a class of `Options` stands for the fields of that class. The first paragraph about a parameter is the help of its
option; further paragraphs are for Python only. The text before ``Parameters`` is the help of the command, and lines
with ``$`` below ``Examples`` are examples to copy. `loralens.cli.command_table` has what Python cannot say.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import isfinite
from pathlib import Path
from shutil import get_terminal_size
from textwrap import shorten
from typing import Any, Literal, get_args, get_origin

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from loralens import choices
from loralens.cli.command_table import ARGUMENTS, FIGURE, HEADINGS, METAVARS, NAMES, PLACES, RANGES, Row
from loralens.cli.usage_hints import check_dashes, missing_parameters

SOURCES = Path(__file__).parents[2]
REQUIRED = object()  # in place of a default
MAIN, SHOWING = "Options", "Showing the result"
LAST = ("Modules", "Writing", "Computing", "Reading adapters", SHOWING)  # headings, after those of single commands
LIST = "list"  # in place of a program: list them
WIDEST = 26  # columns of the words of options, beside which explanations stand
WIDEST_CHOICES = 60  # letters of the values of an option that stand in place of a word for them
# Every number of something is at least 1: 0 is never useful, and is refused as wrong usage.
COUNT = click.IntRange(min=1)
EMPTY = "is empty; a variable of the shell may not be set"


class PathType(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # not generic in click 8.1
    """A path that is not empty: ``-o "$OUT"`` with a variable that is not set means no current directory.

    A `PLACE` stays text: an adapter (also ``A:0.7`` or a Hub id), a model, or texts.
    """

    name = "path"

    def __init__(self, kind: type[str] | type[Path] = Path) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        """The path as text or as a path."""
        if value == "":
            self.fail(EMPTY, param, ctx)
        return self.kind(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Let the shell complete the names of files."""
        del ctx, param
        return [CompletionItem(incomplete, type="file")]


PATH, PLACE = PathType(), PathType(str)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter as its source declares it: the text of its type, its default, and what is said about it."""

    name: str
    kind: str
    default: Any
    about: str = ""
    heading: str = MAIN
    argument: bool = False
    star: bool = False

    @property
    def words(self) -> set[str]:
        """The words of the type."""
        return set(re.findall(r"\w+", self.kind))


@dataclass(frozen=True, slots=True)
class Function:
    """A function as its source describes it: its first line, the text below, examples, and parameters."""

    summary: str
    text: str
    examples: list[str]
    parameters: list[Parameter]


@cache
def _parsed(module: str) -> tuple[dict[str, ast.FunctionDef | ast.ClassDef], dict[str, str]]:
    """The functions and classes of a module, and the modules from which it imports other names."""
    path = SOURCES.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(file.read_text(encoding="utf-8")).body
    defined = {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    imports = [node for node in body if isinstance(node, ast.ImportFrom)]
    return defined, {alias.name: str(node.module) for node in imports for alias in node.names}


def read_function(module: str, name: str, row: Row) -> Function:
    """What the source of a function says."""
    node = _parsed(module)[0][name]
    assert isinstance(node, ast.FunctionDef)
    parts = _sections(node)
    summary, _, text = parts[""].partition("\n\n")
    examples = re.findall(r"^\$ (.+)$", parts.get("Examples", ""), re.MULTILINE)
    return Function(" ".join(summary.split()), text, examples, list(_parameters(module, node, row)))


def _sections(node: ast.FunctionDef | ast.ClassDef) -> dict[str, str]:
    """The sections of a numpydoc text by their headings; the text before them has the heading ``""``."""
    start, *rest = re.split(r"\n*^(\w+)\n-{3,}\n", ast.get_docstring(node) or "", flags=re.MULTILINE)
    return {"": start, **dict(zip(rest[::2], rest[1::2], strict=True))}


def _abouts(node: ast.FunctionDef | ast.ClassDef) -> dict[str, str]:
    """Parameter → the first paragraph about it."""
    abouts = {}
    for entry in re.split(r"^(?=\S)", _sections(node).get("Parameters", ""), flags=re.MULTILINE):
        names, _, text = entry.partition("\n")
        for name in names.partition(" :")[0].split(","):
            abouts[name.strip("* ")] = " ".join(text.partition("\n\n")[0].split())
    return abouts


def _parameters(module: str, node: ast.FunctionDef, row: Row) -> Iterator[Parameter]:
    abouts, args = _abouts(node), node.args
    missing: list[ast.expr | None] = [None] * (len(args.args) - len(args.defaults))
    given = [*zip(args.args, [*missing, *args.defaults], strict=True)]
    if args.vararg:
        given.insert(0, (args.vararg, None))
    for each, default in (*given, *zip(args.kwonlyargs, args.kw_defaults, strict=True)):
        name, kind = each.arg, ast.unparse(each.annotation) if each.annotation else ""
        if name in row.in_python:
            continue
        home = module if kind in _parsed(module)[0] else _parsed(module)[1].get(kind, "")
        if default is None and home.startswith("loralens.") and kind in _parsed(home)[0]:
            # What a verb says of a field itself wins over what its class says.
            yield from (replace(each, about=abouts.get(each.name, each.about)) for each in _fields(home, kind))
            continue
        optional = row.metavars.get(name, "").startswith("[")
        argument = (default is None or optional) and name in ARGUMENTS and name not in row.options
        heading = MAIN if default is None else HEADINGS.get(name, MAIN)
        yield Parameter(name, kind, _value(default), abouts.get(name, ""), heading, argument, each is args.vararg)


def _fields(module: str, name: str) -> Iterator[Parameter]:
    """The fields of a class of options, those of the last class that it extends first, as dataclasses do."""
    fields: dict[str, Parameter] = {}
    for field in _declared(module, name):
        # A class that declares a field again has the last word about it, except on its heading.
        fields[field.name] = replace(field, heading=fields.get(field.name, field).heading)
    yield from fields.values()


def _declared(module: str, name: str) -> Iterator[Parameter]:
    defined, imported = _parsed(module)
    node = defined[name]
    assert isinstance(node, ast.ClassDef)
    for base in map(ast.unparse, reversed(node.bases)):
        home = module if base in defined else imported.get(base, "")
        if home.startswith("loralens.") and base in _parsed(home)[0]:
            yield from _declared(home, base)
    # A class is a group, whose heading is the beginning of its first line.
    abouts, heading = _abouts(node), _sections(node)[""].partition(":")[0]
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            field, default = line.target.id, _value(line.value)
            place = MAIN if default is REQUIRED or field == "output" else heading
            yield Parameter(field, ast.unparse(line.annotation), default, abouts.get(field, ""), place)


def _value(default: ast.expr | None) -> Any:
    """The value of a default; None where that is a name, which stands for what the function finds out."""
    if default is None:
        return REQUIRED
    try:
        return ast.literal_eval(default)
    except ValueError:
        return None


# ---- As parameters of click


def _type(parameter: Parameter, row: Row) -> Any:
    """The type of click for a type of Python."""
    name, words = parameter.name, parameter.words
    # In the order of the type, so that dialects stand before servers.
    literals = [getattr(choices, word, None) for word in re.findall(r"\w+", parameter.kind)]
    if values := [value for one in literals if get_origin(one) is Literal for value in get_args(one)]:
        return click.Choice(values)
    if name in row.types or name in RANGES:
        return row.types.get(name) or RANGES[name]
    if name in PLACES or (parameter.argument and not words & {"PathLike", "str"}):
        return PLACE
    if words & {"Path", "PathLike"} and not words & {"Sequence", "Mapping", "Moments"}:
        return PATH
    if "float" in words and "str" not in words:
        return click.FLOAT
    return COUNT if "int" in words and "str" not in words else click.STRING


def _finite(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Refuse NaN and infinity as wrong usage; Python's float accepts both as text."""
    del ctx
    if isinstance(value, float) and not isfinite(value):
        raise click.BadParameter("must be a finite number", param=param)
    return value


def _list_consumers(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Show the programs instead of running the command, which then needs no adapter."""
    del param
    if value == LIST:
        # Imported here, as the verb imports NumPy.
        from loralens.cli.command_table import RowOptions
        from loralens.cli.show import show
        from loralens.verbs.spectra.inspect import list_consumers

        show(list_consumers(), RowOptions())
        ctx.exit()
    return value


class _Option(click.Option):
    """An option with the heading below which the help lists it."""

    heading = SHOWING


def _param(parameter: Parameter, row: Row, translate: Callable[[str], str]) -> click.Parameter:
    """The argument or the option of a parameter."""
    name, kind, default, words = parameter.name, _type(parameter, row), parameter.default, parameter.words
    metavar = row.metavars.get(name) or METAVARS.get(name)
    if parameter.argument:
        several = parameter.star or "Source" in words
        metavar = metavar or name.upper()
        metavar = metavar if not several or "..." in metavar else f"{metavar}..."
        required = not metavar.startswith("[")
        return click.Argument([name], type=kind, nargs=-1 if several else 1, required=required, metavar=metavar)
    multiple = default == ()
    names = NAMES.get(name, (f"--{name.replace('_', '-')}",))
    text = f"{translate(parameter.about)}{' Repeatable.' if multiple else ''}"
    # As the word for the value, a long list would not fit on a line, and break words.
    if isinstance(kind, click.Choice) and len("|".join(kind.choices)) > WIDEST_CHOICES:
        metavar, text = metavar or "NAME", f"{text} One of {', '.join(kind.choices)}."
    keywords: dict[str, Any] = {"help": text, "required": default is REQUIRED}
    if default is not REQUIRED and not multiple:
        keywords |= {"default": default, "show_default": default is not None and default is not False}
    if "bool" in words:
        if default is not False and name not in NAMES:
            names = (f"{names[0]}/--no-{names[0][2:]}",)
        keywords["is_flag"] = True
    else:
        if not isinstance(kind, click.Choice):
            metavar = metavar or {click.STRING: "NAME", PATH: "FILE", PLACE: "FILE"}.get(
                kind, "N" if "int" in words else "X"
            )
        keywords |= {"type": kind, "multiple": multiple, "metavar": metavar, "callback": _finite}
        if "Consumer" in words:
            keywords |= {"type": click.Choice([*kind.choices, LIST]), "callback": _list_consumers, "is_eager": True}
        # Two names; the size of a figure and a setting are one word.
        if "tuple" in words and kind is click.STRING:
            keywords["nargs"] = parameter.kind.count("str")
        # A value that stands for the option without one.
        if name in row.flag_values:
            keywords |= {"is_flag": False, "flag_value": row.flag_values[name]}
    option = _Option([*names, name], **keywords)
    option.heading = parameter.heading
    return option


# ---- The command


def _is_given(value: object) -> bool:
    """Whether the parser has a value for a parameter; a version of click has a mark of its own for none."""
    return value not in (None, (), []) and getattr(value, "name", "") != "UNSET"


class _Formatter(click.HelpFormatter):
    """Breaks lines at spaces only, so that the names of options stay whole."""

    def write(self, string: str) -> None:
        super().write(string.replace("\N{NON-BREAKING HYPHEN}", "-"))

    def write_text(self, text: str) -> None:
        super().write_text(text.replace("-", "\N{NON-BREAKING HYPHEN}"))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        whole = [(words, text.replace("-", "\N{NON-BREAKING HYPHEN}")) for words, text in rows]
        super().write_dl(whole, col_max, col_spacing)


class _Context(click.Context):
    formatter_class = _Formatter


class DerivedCommand(click.Command):
    """A command whose help has one line about it, examples, options in groups, and then the rest of the text."""

    context_class = _Context

    def __init__(self, function: Function, *, needs_target: bool, **keywords: Any) -> None:
        translate = _translation(function.parameters)
        self.needs_target = needs_target
        super().__init__(**keywords, help=translate(function.summary))
        self.examples, self.text = function.examples, translate(function.text)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words; everything that is missing is one message, before any work."""
        words = list(args)
        try:
            rest = super().parse_args(ctx, args)
        except click.MissingParameter:
            given = self.make_parser(ctx).parse_args(words)[0]
        else:
            given = ctx.params
        missing = [param for param in self.params if param.required and not _is_given(given.get(param.name or ""))]
        # Adapters are optional only where a recipe may name them.
        has_recipe = any(param.name == "recipe" for param in self.params)
        if has_recipe and not any(_is_given(given.get(name)) for name in ("recipe", "adapters")):
            missing += [param for param in self.params if param.name == "adapters"]
        # A dry run needs no target, so that click cannot declare it as required.
        if self.needs_target and not (_is_given(given.get("output")) or given.get("dry_run") is True):
            missing += [param for param in self.params if param.name == "output"]
        if missing and not ctx.resilient_parsing:
            raise missing_parameters(missing, given, ctx)
        return rest

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the line and the examples."""
        super().format_help_text(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"  {line}\n")

    def _options(self, ctx: click.Context) -> dict[str, dict[str, tuple[str, str]]]:
        """Heading → the long names of its options, each with the words and the text of its help."""
        # The ranks of a command that needs a rule for them are what most calls say.
        groups: dict[str, dict[str, tuple[str, str]]] = {"Ranks": {}} if self.name == "compress" else {}
        groups[MAIN] = {}
        # Where to write comes first, since nearly every call has it.
        for param in sorted(self.get_params(ctx), key=lambda param: param.name != "output"):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)):
                name = max((each for each in param.opts if each not in ("--lambda", "--consumer")), key=len)
                groups.setdefault(getattr(param, "heading", SHOWING), {})[name] = record
        order = [*(each for each in groups if each not in LAST), *LAST]
        return {heading: groups[heading] for heading in order if groups.get(heading)}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options below their headings, and the rest of the text."""
        groups = self._options(ctx)
        # One width for all groups, so that the page has one column of explanations.
        width = min(WIDEST, max(len(words) for records in groups.values() for words, _ in records.values()))
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl([(words.ljust(width), text) for words, text in records.values()], col_max=WIDEST)
        if self.text:
            with formatter.section("More"):
                formatter.write_text(self.text)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help; of one that is longer than the terminal, what fits there: other options by their names."""
        super().format_help(ctx, formatter)
        lines = get_terminal_size().lines - 1 if sys.stdout.isatty() else 0
        if not lines or formatter.getvalue().count("\n") <= lines:
            return
        groups = self._options(ctx)
        ranks = groups.pop("Ranks") if self.name == "compress" else {}
        main = groups.pop(next(iter(groups)))
        records = {name: main[name] for name in ["--output"] if name in main} | ranks | main
        # All main options with their whole explanations; else with one line for each; else some of them.
        for count in (len(records) + 1, *range(len(records), 0, -1)):
            brief = ctx.make_formatter()
            self.format_usage(ctx, brief)
            self.format_help_text(ctx, brief)
            with brief.section(MAIN):
                rows = [
                    (words.ljust(WIDEST), text) if count > len(records) else _in_a_line(words, text, brief.width)
                    for words, text in records.values()
                ]
                brief.write_dl(rows[:count], col_max=WIDEST)
            others = {"Also": list(records)[count:], **groups}
            brief.write_paragraph()
            brief.write_text(" ".join(f"{heading}: {', '.join(names)}." for heading, names in others.items() if names))
            brief.write(f"{ctx.command_path} --help | less  explains all of them.\n")
            if brief.getvalue().count("\n") <= lines:
                break
        formatter.buffer = brief.buffer


def _in_a_line(words: str, text: str, width: int) -> tuple[str, str]:
    """An option of the help, without choices, and the beginning of its explanation, which fit on a line."""
    words = words if len(words) <= WIDEST else words.partition(" [")[0]
    return words.ljust(WIDEST), shorten(re.split(r"(?<=\.) ", text)[0], width - WIDEST - 4, placeholder="…")


def _translation(parameters: Sequence[Parameter]) -> Callable[[str], str]:
    """Turns what docstrings say into the words of the command line: ``sv_ratio`` into --sv-ratio."""
    words = {each.name: NAMES.get(each.name, (f"--{each.name.replace('_', '-')}",))[0] for each in parameters}
    words |= {each.name: METAVARS.get(each.name, each.name.upper()) for each in parameters if each.argument}

    def translate(text: str) -> str:
        text = re.sub(r"``(.+?)``", lambda quoted: words.get(quoted[1], quoted[1]), text)
        return re.sub(r"`loralens\.(\w+)`", r"`loralens \1`", text)

    return translate


def _row_params(row: Row, *, overwrites: bool) -> Iterator[click.Parameter]:
    """The options that show a result: not every result has rows or a figure.

    With ``overwrites`` the command has an ``--overwrite`` of its own, which then counts for the figure too.
    """
    figure = {"plot", *FIGURE, *([] if overwrites else ["overwrite_plot"])} if row.plot else set()
    wanted = (
        figure
        | {"as_json", "quiet", "verbose"}
        | {*["as_metrics"] * bool(row.metrics)}
        | ({"as_csv", *(["rows_shown"] * row.top)} if row.csv else set())
    )
    for each in _fields("loralens.cli.command_table", "RowOptions"):
        if row.shows and each.name in wanted:
            yield _param(replace(each, about=each.about.format(row=row)), row, str)


def derive(
    name: str, function: Function, row: Row, run: Callable[..., None], *, needs_target: bool = False
) -> click.Command:
    """The command of a function, with the options that show its result.

    ``run`` is called with the values of all arguments and options, and with the names of those that the user gave. A
    command that ``needs_target`` needs --output or --dry-run.
    """
    translate = _translation(function.parameters)

    @click.pass_context
    def call(ctx: click.Context, /, **values: Any) -> None:
        run(values, {each for each in values if ctx.get_parameter_source(each) is not ParameterSource.DEFAULT})

    def normalise(word: str) -> str:
        return row.aliases.get(word.replace("-", "_"), word).replace("_", "-")

    overwrites = any(each.name == "overwrite" for each in function.parameters)
    params = [
        *(_param(each, row, translate) for each in function.parameters),
        *_row_params(row, overwrites=overwrites),
    ]
    settings = {"token_normalize_func": normalise} if row.aliases else {}
    return DerivedCommand(
        function, needs_target=needs_target, name=name, params=params, callback=call, context_settings=settings
    )


class DerivedGroup(click.Group):
    """A group whose commands are derived when they are called.

    ``groups`` has the headings of its help, below each of them the names of commands, and what each does.
    """

    context_class = _Context

    def __init__(
        self,
        *arguments: Any,
        find: Callable[[str], click.Command],
        groups: Mapping[str, Mapping[str, str]],
        **keywords: Any,
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.find, self.groups = find, groups

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words before the command; without any the help is the answer, on standard output."""
        if not args and not ctx.resilient_parsing:
            click.echo(self.overview(ctx))
            ctx.exit()
        return super().parse_args(ctx, args)

    def overview(self, ctx: click.Context) -> str:
        """What is printed where no command is given."""
        return ctx.get_help()

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order of the table; click would sort them."""
        del ctx
        return [name for names in self.groups.values() for name in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Derive the command."""
        return self.find(cmd_name) if cmd_name in self.list_commands(ctx) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of the first word, after a look at the dashes of its options."""
        name, command, arguments = super().resolve_command(ctx, args)
        if command and not ctx.resilient_parsing:
            check_dashes(command, arguments, click.Context(command, ctx, info_name=name))
        return name, command, arguments

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands in their groups, without deriving them."""
        # One width for all groups, so that the page has one column of explanations.
        width = max(map(len, self.list_commands(ctx)))
        for group, names in self.groups.items():
            with formatter.section(group):
                formatter.write_dl([(name.ljust(width), line) for name, line in names.items()])
