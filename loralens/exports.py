"""Lazy imports of public names, and signatures in which all options are written out."""

from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import Parameter, signature
from typing import Any, TypeVar, get_args

F = TypeVar("F", bound=Callable[..., Any])


def lazy_exports(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package whose public names stand in modules below it.

    Parameters
    ----------
    package : str
        Its ``__name__``.
    homes : mapping of str to str
        Public name → the module that defines it, without the package's own name. Modules that a program has imported
        are not listed: what is public is what this says.
    """

    def get_attribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return get_attribute, lambda: sorted(homes)


def with_options_written_out(function: F) -> F:
    """The function itself, every option of ``**options: Unpack[Options]`` in the signature that ``help`` shows.

    An option of a `TypedDict` has no default of its own there: it is False where the option is a bool, else None.
    """
    parameters: list[Parameter] = []
    for parameter in signature(function).parameters.values():
        if parameter.kind is not Parameter.VAR_KEYWORD:
            parameters.append(parameter)
            continue
        (options,) = get_args(parameter.annotation)
        parameters += [
            Parameter(name, Parameter.KEYWORD_ONLY, default=False if kind is bool else None, annotation=kind)
            for name, kind in options.__annotations__.items()
        ]
    vars(function)["__signature__"] = signature(function).replace(parameters=parameters)
    return function
