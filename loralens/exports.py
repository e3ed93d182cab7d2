"""Lazy imports of public names, also as methods, and arguments that a function reads or gathers into options."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from importlib import import_module
from inspect import BoundArguments, Parameter, Signature, getdoc, signature
from pathlib import Path
from textwrap import indent
from types import MethodType
from typing import Any, TypeVar, cast, get_args

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


def homes_of(package: str) -> dict[str, str]:
    """The public names of a package, and the module that defines each, from the imports in its source."""
    source = Path(str(sys.modules[package].__file__)).read_text(encoding="utf-8")
    found = re.findall(r"^    from (\S+) import (\w+) as \2$", source, re.MULTILINE)
    return {name: module for module, name in found}


def lazy_exports(package: str) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__all__``, ``__getattr__`` and ``__dir__`` of a package whose public names are defined in its modules.

    The source of the package lists them once, as imports for type checkers below `TYPE_CHECKING`, in the form
    ``from module import name as name``. At run time a name is imported when it is first used.
    """
    homes = homes_of(package)

    def get_attribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    # dir() would also list the modules that happen to have been imported, which are not public names.
    return sorted(homes), get_attribute, lambda: sorted(homes)


class PublicMethods:
    """Public functions as methods: ``compress = PublicMethods().compress`` in the body of a class.

    The function is imported when the method is first used, so that a class can have methods of the floors above it.
    """

    # For type checkers: what stands in the class is called.
    def __getattr__(self, name: str) -> Callable[..., Any]:
        return _PublicMethod(name)  # type: ignore[return-value]


# Of these functions the method takes the base without its keyword: adapter.merge(base).
ON_BASE = ("amplify", "intruders", "merge")


class _PublicMethod:
    """One function of `loralens` as a method, whose object is the first argument."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type) -> Any:
        function = getattr(import_module("loralens"), self._name)
        if instance is None:
            return function
        if self._name not in ON_BASE:
            return MethodType(function, instance)

        @wraps(function)
        def on_base(base: Any, **keywords: Any) -> Any:
            return function(instance, base=base, **keywords)

        parameters = [*signature(function).parameters.values()][1:]
        first = [each.replace(kind=Parameter.POSITIONAL_OR_KEYWORD) for each in parameters if each.name == "base"]
        rest = [each for each in parameters if each.name != "base"]
        vars(on_base)["__signature__"] = signature(function).replace(parameters=first + rest)
        return on_base


# Type → what turns an argument into it. It applies to every parameter of `takes_options` whose type has this part.
READERS: dict[type, Callable[[Any], Any]] = {}


def _parts(annotation: Any) -> Iterator[Any]:
    """The types that an annotation consists of."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def bind(name: str, parameters: Signature, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> BoundArguments:
    """The arguments of a call by their parameters.

    Raises
    ------
    TypeError
        One is missing, there is one too many, or a keyword is unknown; the message names the nearest.
    """
    try:
        return parameters.bind(*arguments, **keywords)
    except TypeError as error:
        unknown = next((word for word in keywords if word not in parameters.parameters), None)
        if unknown is None:
            raise TypeError(f"{name}(): {error}") from None
    from difflib import get_close_matches  # only when something is wrong

    near = get_close_matches(unknown, parameters.parameters, 1)
    meant = f"did you mean {near[0]!r}?" if near else f"help(loralens.{name}) lists what it has"
    raise TypeError(f"{name}() has no {unknown!r}; {meant}")


def checks_keywords(function: F) -> F:
    """Return the function, whose error about a misspelt keyword names the nearest one."""
    parameters = signature(function)

    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if not keywords.keys() <= parameters.parameters.keys():
            bind(function.__name__, parameters, arguments, keywords)
        return function(*arguments, **keywords)

    return cast("F", call)


class Options:
    """Options that belong together: the base of frozen dataclasses that `takes_options` makes of keywords."""


def _with_fields(text: str, group: str, kind: type[Options]) -> str:
    """The docstring of a function with the fields of a group of options in place of the group.

    What the function says of a field itself stays.
    """
    place = re.search(rf"^    {group} : .*\n(?: {{8}}.*\n)+", text, re.MULTILINE)
    if not place:
        return text
    classes = [each for each in reversed(kind.__mro__) if issubclass(each, Options)]
    about = "\n".join((getdoc(each) or "").partition("\n----------\n")[2] for each in classes)
    entries = re.split(r"^(?=\S)", f"{about.strip()}\n", flags=re.MULTILINE)
    # The class that declares a field last has the last word about it.
    told = {each.partition(" :")[0]: each for each in entries}
    new = "".join(each for name, each in told.items() if f"\n    {name} :" not in text)
    return text[: place.start()] + indent(new, "    ") + text[place.end() :]


def takes_options(function: Callable[..., R]) -> Callable[..., R]:
    """Return the function with keywords in place of its parameters that are `Options`: one for each of their fields.

    `help` and editors then show the options one by one, with what the classes say about them, and the function gets
    them in groups.
    """
    text = function.__doc__ or ""
    written: list[Parameter] = []
    groups: dict[str, tuple[type[Options], list[str]]] = {}
    for name, parameter in signature(function).parameters.items():
        kind = parameter.annotation
        if not (isinstance(kind, type) and issubclass(kind, Options)):
            written.append(parameter)
            continue
        fields = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in signature(kind).parameters.values()]
        groups[name] = kind, [field.name for field in fields]
        written += fields
        text = _with_fields(text, name, kind)
    flat = signature(function).replace(parameters=sorted(written, key=lambda each: each.kind))

    readers = {
        name: READERS[kind]
        for name, parameter in flat.parameters.items()
        for kind in _parts(parameter.annotation)
        if isinstance(kind, type) and kind in READERS
    }

    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> R:
        bound = bind(function.__name__, flat, arguments, keywords)
        for name in readers.keys() & bound.arguments.keys():
            value, read = bound.arguments[name], readers[name]
            star = flat.parameters[name].kind is Parameter.VAR_POSITIONAL
            bound.arguments[name] = tuple(map(read, value)) if star else read(value)
        named = bound.kwargs
        gathered = {
            group: kind(**{name: named.pop(name) for name in names if name in named})
            for group, (kind, names) in groups.items()
        }
        return function(*bound.args, **named, **gathered)

    call.__doc__ = text
    vars(call)["__signature__"] = flat  # inspect.signature takes it instead of the real parameters
    return call
