"""Lazy imports of public names, and signatures in which all options are written out."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from inspect import Parameter, signature
from typing import Any, TypeVar, get_args

F = TypeVar("F", bound=Callable[..., Any])


def lazy_exports(
    package: str, names_by_module: Mapping[str, Sequence[str]]
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__all__``, ``__getattr__`` and ``__dir__`` of a package whose public names are defined in its modules.

    A name is imported when it is first used. For type checkers the package imports the names under `TYPE_CHECKING`, in
    the form ``import name as name``, which marks them as public.

    Parameters
    ----------
    package : str
        The ``__name__`` of the package.
    names_by_module : mapping of str to sequence of str
        Module, without the name of the package → the public names that it defines.
    """
    homes = {name: module for module, names in names_by_module.items() for name in names}

    def get_attribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    # dir() would also list the modules that happen to have been imported, which are not public names.
    return sorted(homes), get_attribute, lambda: sorted(homes)


def with_options_written_out(function: F) -> F:
    """Return the function, after every option of its ``**options: Unpack[Options]`` was added to its signature.

    `help` and editors then show the options one by one. A `TypedDict` states no defaults, so an option of type bool is
    shown with the default False and any other with None.
    """
    parameters: list[Parameter] = []
    for parameter in signature(function).parameters.values():
        if parameter.kind is not Parameter.VAR_KEYWORD:
            parameters.append(parameter)
            continue
        # The annotation is Unpack[Options], whose one argument is the TypedDict.
        (options,) = get_args(parameter.annotation)
        parameters += [
            Parameter(name, Parameter.KEYWORD_ONLY, default=False if kind is bool else None, annotation=kind)
            for name, kind in options.__annotations__.items()
        ]
    # inspect.signature takes this attribute, if there is one, instead of the real parameters.
    vars(function)["__signature__"] = signature(function).replace(parameters=parameters)
    return function
