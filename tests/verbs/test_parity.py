"""Every command has a function of the same name, with the same options, types, defaults and order of arguments."""

from collections.abc import Sequence
from importlib import import_module
from inspect import Parameter, signature
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click
import pytest

import loralens
from loralens.cli.combine import Setting
from loralens.cli.overview import COMMANDS
from loralens.verbs import VERBS

DISPLAY = {
    "as_json",
    "as_csv",
    "plot",
    "quiet",
    "verbose",
    "rows_shown",
    "figure_title",
    "figure_size",
    "figure_dpi",
    "overwrite_plot",
}  # how a result is shown is no business of the function
REQUIRED = "required"  # in place of a default


def _command(verb: str) -> click.Command:
    command: click.Command = import_module(f"loralens.cli.{verb}").command
    return command


def options_of(verb: str) -> dict[str, Any]:
    """Name of a command's option or argument → its default, but for those that only display."""
    command: click.Command = import_module(f"loralens.cli.{verb}").command
    context = click.Context(command)
    return {
        str(param.name): REQUIRED if param.required else _plain(param.get_default(context))
        for param in command.params
        if param.name not in DISPLAY and param.expose_value and not isinstance(param, click.Argument)
    }


def arguments_of(verb: str) -> list[str]:
    command: click.Command = import_module(f"loralens.cli.{verb}").command
    return [str(param.name) for param in command.params if isinstance(param, click.Argument)]


def parameters_of(verb: str) -> dict[str, Any]:
    """Name of a function's keyword → its default."""
    function = getattr(loralens, verb)
    arguments = arguments_of(verb)
    parameters = signature(function).parameters.values()
    return {each.name: _plain(each.default) for each in parameters if each.name not in arguments}


def _plain(default: Any) -> Any:
    if default is Parameter.empty:
        return REQUIRED
    if isinstance(default, Path):
        return str(default)
    return None if default in ((), [], None) or type(default).__name__ == "Sentinel" else default


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_and_its_function_have_the_same_options_and_defaults(verb: str) -> None:
    assert parameters_of(verb) == options_of(verb)


def values_of(param: click.Parameter) -> list[Any]:
    """Values that click makes of an option: every choice of a choice, one value of any other type."""
    kind = param.type
    if isinstance(kind, click.Choice):
        values: list[Any] = list(kind.choices)
    elif isinstance(kind, click.Tuple | Setting):
        values = [("x", 0.5)]
    elif isinstance(kind, click.Path):
        values = [Path("x")]
    else:
        name = kind.name.removesuffix(" range")
        values = [{"boolean": True, "integer": 1, "float": 0.5, "text": "x", "file or folder": "x"}[name]]
    return [tuple(values)] if param.multiple else values


def is_of(value: Any, kind: Any) -> bool:
    """Whether a type checker would accept a value where this type is declared."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or origin is Literal:
        return kind is Any or value in inner
    if origin in (Union, UnionType):
        return any(is_of(value, member) for member in inner)
    if not isinstance(value, origin or kind):
        return kind is float and isinstance(value, int)
    if isinstance(value, str | Path) or not inner:
        return True
    members = inner if origin is tuple and inner[-1] is not Ellipsis else inner[:1] * len(value)
    return len(members) == len(value) and all(map(is_of, value, members))


def test_what_is_of_a_type() -> None:
    assert is_of("a", Literal["a"])
    assert not is_of("b", Literal["a"])
    assert is_of(("a", 0.5), tuple[str, float])
    assert not is_of(("a", "b"), tuple[str, float])
    assert is_of(("a",), Sequence[str])
    assert not is_of((0.5,), Sequence[str])
    assert is_of(Path("a"), str | PathLike[str])
    assert not is_of(Path("a"), str)


@pytest.mark.parametrize("verb", VERBS)
def test_a_function_accepts_the_types_of_its_command(verb: str) -> None:
    """The commands pass their values on as ``**keywords``, of which a type checker knows nothing."""
    parameters = signature(getattr(loralens, verb)).parameters
    command: click.Command = import_module(f"loralens.cli.{verb}").command
    for param in command.params:
        if param.name in options_of(verb):
            kind = parameters[str(param.name)].annotation
            refused = [value for value in values_of(param) if not is_of(value, kind)]
            assert not refused, f"{param.name}: {refused} are not {kind}"


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_and_its_function_have_the_same_arguments(verb: str) -> None:
    positional = [
        name
        for name, parameter in signature(getattr(loralens, verb)).parameters.items()
        if parameter.kind not in (Parameter.VAR_KEYWORD, Parameter.KEYWORD_ONLY)
    ]
    # Python may pass in order what a command requires, the two that weights of blocks may stand for, and the adapter
    # that calibrate needs but for the inputs of a base.
    options = {name for name, default in options_of(verb).items() if default == REQUIRED}
    options |= {"scale": {"by"}, "drop": {"modules"}, "calibrate": {"adapter"}}.get(verb, set())
    assert [name for name in positional if name not in options] == arguments_of(verb)


DRAWING = [verb for verb in VERBS if "plot" in {param.name for param in _command(verb).params}]


@pytest.mark.parametrize("verb", DRAWING)
def test_a_command_that_draws_has_the_keywords_of_plot(verb: str) -> None:
    context = click.Context(_command(verb))
    options = {param.name: param for param in _command(verb).params if str(param.name).startswith("figure_")}
    keywords = {
        name: each for name, each in signature(loralens.plot).parameters.items() if each.kind is Parameter.KEYWORD_ONLY
    }
    assert list(options) == list(keywords)
    assert all(_plain(options[name].get_default(context)) == _plain(keywords[name].default) for name in options)
    converted = {
        "figure_title": options["figure_title"].type.convert("x", None, None),
        "figure_size": options["figure_size"].type.convert("6.5x4", None, None),
        "figure_dpi": options["figure_dpi"].type.convert("300", None, None),
    }
    assert converted == {"figure_title": "x", "figure_size": (6.5, 4.0), "figure_dpi": 300.0}
    assert all(is_of(value, keywords[name].annotation) for name, value in converted.items())


def test_every_command_but_demo_and_fleet_is_a_verb() -> None:
    assert set(COMMANDS) - {"demo", "fleet"} == set(VERBS)
