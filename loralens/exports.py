"""Lazy imports of public names, and keywords that a function gathers into classes of options."""

import re
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from inspect import Parameter, getdoc, signature
from pathlib import Path
from textwrap import indent
from typing import Any, TypeVar

R = TypeVar("R")


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

    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> R:
        flat.bind(*arguments, **keywords)  # raises the TypeError of Python about unknown and missing ones
        gathered = {
            group: kind(**{name: keywords.pop(name) for name in names if name in keywords})
            for group, (kind, names) in groups.items()
        }
        return function(*arguments, **keywords, **gathered)

    call.__doc__ = text
    vars(call)["__signature__"] = flat  # inspect.signature takes it instead of the real parameters
    return call
