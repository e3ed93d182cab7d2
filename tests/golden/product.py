"""Product: where the project keeps its entry point and its version. When files move, this file follows."""

from importlib import import_module
from typing import Any

VERSION = "0.0.0"  # in place of the project's own, in all that is printed and written


def entry_point() -> Any:
    """The click group behind ``loralens``, with a version that never changes."""
    import_module("loralens").__version__ = VERSION
    import_module("loralens.version").__version__ = VERSION  # before any other module imports it by name
    return import_module("loralens.cli.main").main
