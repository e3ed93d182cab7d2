"""Every command has a function of the same name, with the same options, defaults and order of arguments."""

from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import click
import pytest

import loralens
from loralens.cli.main import COMMANDS
from loralens.verbs import VERBS

DISPLAY = {"as_json", "as_csv", "plot", "quiet", "verbose"}  # how a result is shown is no business of the function
REQUIRED = "required"  # in place of a default


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


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_and_its_function_have_the_same_arguments(verb: str) -> None:
    positional = [
        name
        for name, parameter in signature(getattr(loralens, verb)).parameters.items()
        if parameter.kind not in (Parameter.VAR_KEYWORD, Parameter.KEYWORD_ONLY)
    ]
    options = {
        name for name, default in options_of(verb).items() if default == REQUIRED
    }  # Python may pass them in order
    assert [name for name in positional if name not in options] == arguments_of(verb)


def test_every_command_but_demo_is_a_verb() -> None:
    assert set(COMMANDS) - {"demo"} == set(VERBS)
