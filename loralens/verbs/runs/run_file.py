"""Run files: the settings of a run as TOML, written beside every run, and read as options of ``train``."""

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from loralens.choices import TRAINING_NAMES
from loralens.core.names import nearest
from loralens.errors import FormatError, MissingFileError, OptionError, place
from loralens.formats.files.outside import read_whole
from loralens.formats.records.training import RUN_FILE
from loralens.verbs.runs.grid_axes import as_flag, parser_of, spell
from loralens.verbs.runs.training_options import BY_HAND, DECIDED, TrainingOptions, check_trl_settings, pairs_of

R = TypeVar("R")
# Where a run writes, how it goes on, and what changes no number: they belong to the command and not to the run.
LEFT_OUT = ("output", "device", "threads", "resume", "more_steps", "overwrite", "dry_run")
# A run file may come from anybody: where a run writes, and what it replaces, the user says who starts it.
REFUSED = ("output", "resume", "more_steps", "overwrite")
TEXTS = ("data", "eval")  # which may stand in the file itself
NUMBERS: Mapping[Any, tuple[Any, str]] = {
    as_flag: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
}


def reads_run_files(function: Callable[..., R]) -> Callable[..., R]:
    """Return the function with the options of ``run_file`` and of the run ``like`` where the caller gives none.

    The names of PEFT and TRL become ours.
    """

    @wraps(function)
    def call(run_file: Any = None, *, like: str | PathLike[str] | None = None, **keywords: Any) -> R:
        options: dict[str, Any] = {}
        for path in (Path(each) for each in (like, run_file) if each):
            options |= read_run_file(path / RUN_FILE if path.is_dir() else path)
        given = _renamed(keywords)
        # Each replaces the other.
        for name, other in (("steps", "epochs"), ("epochs", "steps")):
            if given.get(name) is not None:
                options.pop(other, None)
        return function(None, **{**options, **given})

    return call


def _renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by our names."""
    renamed: dict[str, Any] = {}
    for key, value in options.items():
        name = TRAINING_NAMES.get(key, key)
        if name in renamed:
            raise OptionError(f"{key} and another name of {name} are given", fix="leave one of them out")
        renamed[name] = value
    return renamed


def read_run_file(path: Path) -> dict[str, Any]:
    """The options of a run file.

    Raises
    ------
    OptionError
        The file is not there, or has an option that does not exist, is not of its type, or that no file may set.
    FormatError
        It is not TOML.
    """
    if not path.is_file():
        raise MissingFileError(
            f"{path}: no such file", fix=f"give a run file, or the folder of a run that has a {RUN_FILE}"
        )
    known = {field.name: field for field in fields(TrainingOptions)}
    with place(path):
        try:
            options = _renamed(tomllib.loads(read_whole(path).decode()))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(
                f"is not TOML: {error}", fix='write one option per line: rank = 8, model = "DIR"'
            ) from error
        for name, value in options.items():
            if name not in known:
                raise OptionError(f"train has no option {name!r}", fix=f"nearest: {nearest(name, known)}")
            if name in REFUSED:
                raise OptionError(f"a run file may not set {name}", fix=f"take it out; give --{spell(name)} yourself")
            _check_type(known[name], value)
        if "trl" in options:
            options["trl"] = pairs_of("trl", options["trl"])
            # The run itself checks which of these its task has.
            check_trl_settings(options["trl"], "dpo", by_hand=False)
    return options


def _check_type(field: Field[Any], value: Any) -> None:
    """Refuse a value of a TOML type that the option does not have."""
    types, kind = NUMBERS.get(parser_of(field.name), (str, "a text"))
    # The globs, and the options with pairs.
    if field.default == ():
        types, kind = (str, list, dict), "a text, a list of texts, or a table"
    elif field.name in TEXTS:
        types, kind = (str, list), "a path or a list"
    texts = field.name in TEXTS or not isinstance(value, list) or all(isinstance(each, str) for each in value)
    if not isinstance(value, types) or (isinstance(value, bool) and types is not bool) or not texts:
        raise OptionError(
            f"{field.name} is {value!r:.60}, which is not {kind}", fix=f"see train --help: {spell(field.name)}"
        )


def run_file_text(options: TrainingOptions) -> str:
    """The settings of a run as TOML; objects of Python are named in a comment."""
    lines = []
    for field in fields(options):
        value = getattr(options, field.name)
        # What the adapter to start from decides is not an option beside it.
        if field.name in LEFT_OUT or value is None or (options.start_from is not None and field.name in DECIDED):
            continue
        value = str(value) if isinstance(value, PathLike) else value
        if isinstance(value, Mapping):
            value = {name: each for name, each in value.items() if name not in BY_HAND}
        try:
            lines.append(f"{field.name} = {_toml(value)}\n")
        except TypeError:
            lines.append(f"# {field.name} was an object of Python\n")
    return "".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # JSON and TOML write numbers, truth values and texts alike, where letters are not escaped in pairs.
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
