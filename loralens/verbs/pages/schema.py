"""The verb ``schema``: the JSON Schema of what a command prints with ``--json``."""

from importlib import import_module
from inspect import get_annotations
from types import NoneType
from typing import Any, get_args

from loralens.errors import OptionError
from loralens.tables.schema import schema_of
from loralens.verbs import VERBS

DIALECT = "https://json-schema.org/draft/2020-12/schema"
ANSWERS = ("index", "near", "copies", "runs", "families", "explain", "bases", "empty", "stats", "rows")  # of a fleet


def schema(*name: str) -> dict[str, Any]:
    """Print the JSON Schema of what a command prints with --json.

    COMMAND is the name of a command, such as compress or fleet near.

    Parameters
    ----------
    *name : str
        The name of a verb, or ``fleet near`` and the like.

    Raises
    ------
    OptionError
        No command of this name prints JSON.

    Examples
    --------
    $ loralens schema compress
    """
    command = " ".join(name)
    verb = command.removeprefix("fleet ")
    package = import_module("loralens")
    if command in VERBS and command != "schema":
        function = getattr(package, command)
    elif command != verb and verb in ANSWERS:
        function = getattr(package.Fleet, "update" if verb == "index" else verb)
    else:
        known = ", ".join([*(each for each in VERBS if each != "schema"), *(f"fleet {each}" for each in ANSWERS)])
        raise OptionError(f"no command {command!r:.100} prints JSON", fix=f"give one of {known}")
    kind = get_annotations(function, eval_str=True)["return"]
    # None is what a verb returns that has written a file in place of an answer.
    schemas = [schema_of(each) for each in get_args(kind) or (kind,) if each is not NoneType]
    for each in schemas:
        each["properties"] = {"loralens": {"type": "string"}} | each["properties"]
        each["required"].insert(0, "loralens")
    content = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"$schema": DIALECT, "title": f"loralens {command} --json", **content}
