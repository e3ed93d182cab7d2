"""The axes of a grid: option → values. Parses and checks them, and makes the list of runs."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from itertools import product
from math import prod
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from loralens.core.names import nearest
from loralens.errors import OptionError
from loralens.verbs.runs.training_options import TrainingOptions

# "rank=1,8,64"; several of these; a mapping of options to values; or several mappings, whose runs are all made.
Grid = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]

# Options of the whole grid: where it writes, how it goes on, and what changes no number of a result, or none on one
# machine. They are neither axes nor settings of a run.
WHOLE = ("output", "device", "threads", "save_every", "resume", "more_steps", "overwrite", "dry_run", "shard")
MOST_RUNS = 10_000  # a range like seed=0..1000000 is a mistake
_RANGE = re.compile(r"(-?[0-9]+)\.\.(-?[0-9]+)")
# What a name of a folder may contain on every system, and what every shell passes on unquoted.
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")
LONGEST = 60  # characters of one value in the name of a run; file systems allow 255 bytes for the whole name
FLAGS = {"true": True, "false": False}


class GridPoint(NamedTuple):
    """One run of a grid: its name, and the values of the axes by option."""

    name: str
    values: Mapping[str, Any]


def grid_points(grid: Grid, fixed: Iterable[str]) -> list[GridPoint]:
    """The runs of a grid in their order, where the last axis varies fastest. Equal runs come once.

    Parameters
    ----------
    grid : str, mapping, or sequence of these
        Texts are ``OPTION=VALUE,VALUE…``, one for each axis. In a mapping, values may be such a text, a list of values,
        or a single value. Every mapping of a sequence is a grid of its own.
    fixed : iterable of str
        The options that have one value for all runs, which cannot be axes.

    Raises
    ------
    OptionError
        An option does not exist, cannot be an axis, or is given twice; a text is not a value of the option.
    """
    parts = [grid] if isinstance(grid, str | Mapping) else list(grid)
    texts = [part for part in parts if isinstance(part, str)]
    if texts and len(texts) < len(parts):
        raise OptionError("the grid has texts and mappings", fix="give mappings alone, or texts alone")
    grids = [_axes_of(part) for part in ([_mapping_of_texts(texts)] if texts else parts)]
    points: dict[str, GridPoint] = {}
    for axes in grids:
        for option in axes:
            if option in fixed:
                what = f"--{spell(option)} is given for all runs and as an axis of the grid"
                raise OptionError(what, fix="leave one of them out")
        count = prod(map(len, axes.values()))
        if count > MOST_RUNS:
            raise OptionError(f"the grid has {count:,} runs", fix=f"give fewer values: at most {MOST_RUNS:,} runs")
        for combination in product(*axes.values()):
            point = dict(zip(axes, combination, strict=True))
            name = _name_of(point)
            # 8 and 8.0 are the same value. Two files of one name in two folders are not, although the name is the same.
            if points.setdefault(name, GridPoint(name, point)).values != point:
                what = f"two runs of the grid have the name {name}, which is made of the names of files"
                raise OptionError(what, fix="rename one of the files or folders")
    return list(points.values())


def _mapping_of_texts(texts: Sequence[str]) -> dict[str, str]:
    axes: dict[str, str] = {}
    for text in texts:
        option, equals, values = text.partition("=")
        if not equals:
            raise OptionError(f"--grid {text!r} is not OPTION=VALUES", fix="write --grid rank=1,8 or --grid seed=0..4")
        if (option := _option_of(option)) in axes:
            raise OptionError(f"--grid has the axis {spell(option)} twice", fix="give all its values in one --grid")
        axes[option] = values
    return axes


def _axes_of(mapping: Any) -> dict[str, list[Any]]:
    if not isinstance(mapping, Mapping):
        what = f"{mapping!r} is not a grid"
        raise OptionError(what, fix="give a mapping of options to values: {'rank': [1, 8]}")
    axes: dict[str, list[Any]] = {}
    for key, values in mapping.items():
        option = _option_of(key)
        if isinstance(values, str):
            axes[option] = _values_of_text(option, values)
            continue
        # A path and a mapping are single values.
        several = isinstance(values, Iterable) and not isinstance(values, PathLike | Mapping)
        axes[option] = [_plain_value(option, value) for value in (values if several else [values])]
        if not axes[option]:
            raise OptionError(f"the axis {spell(option)} of the grid has no values", fix="give one or more")
    return axes


def _plain_value(option: str, value: Any) -> Any:
    """A value from Python in the form that it has from the command line: globs as a tuple, numbers as Python's own."""
    parse = parser_of(option)
    if isinstance(value, str):
        return _value_of(option, value, parse)
    # NumPy's numbers are not JSON.
    value = value.item() if hasattr(value, "item") and not getattr(value, "ndim", 1) else value
    return tuple(value) if isinstance(value, list) and parse is _as_list else value


def _option_of(key: object) -> str:
    """The option that a key names.

    Raises
    ------
    OptionError
        There is no such option, or it concerns the grid as a whole.
    """
    option = str(key).strip().removeprefix("--").replace("-", "_")
    if option in WHOLE:
        what = f"--grid: {spell(option)} concerns the grid as a whole, so it cannot be an axis"
        raise OptionError(what, fix=f"give --{spell(option)} once, beside --grid")
    if option not in _HINTS:
        near = nearest(spell(option), (spell(name) for name in _HINTS if name not in WHOLE))
        raise OptionError(f"--grid: train has no option {spell(option)!r}", fix=f"nearest: {near}")
    return option


def _values_of_text(option: str, text: str) -> list[Any]:
    """The values that a text lists: with commas, or a range of whole numbers such as 0..4, ends included."""
    parse, values = parser_of(option), []
    for word in text.split(","):
        word = word.strip()
        bounds = _RANGE.fullmatch(word)
        if bounds and parse in (int, float):
            first, last = int(bounds[1]), int(bounds[2])
            if not first <= last < first + MOST_RUNS:
                what = f"--grid {spell(option)}: {word} is not a range"
                raise OptionError(what, fix="write the smaller number first: 0..4")
            values += [parse(str(number)) for number in range(first, last + 1)]
        elif not word:
            raise OptionError(f"--grid {spell(option)}={text}: a value is empty", fix="leave the extra comma out")
        else:
            values.append(_value_of(option, word, parse))
    return values


def _value_of(option: str, word: str, parse: Callable[[str], Any]) -> Any:
    if word == "none" and (parse is _as_list or NoneType in _members(_HINTS[option])):
        return () if parse is _as_list else None
    try:
        return parse(word)
    except ValueError as error:
        kind = {int: "a whole number", float: "a number", as_flag: "true or false"}[parse]
        fix = f"write {spell(option)}=1,8 or {spell(option)}=0..4" if parse is int else f"give {kind}"
        raise OptionError(f"--grid {spell(option)}: {word!r} is not {kind}", fix=fix) from error


# ---- The types of options


def parser_of(option: str) -> Callable[[str], Any]:
    """The function that makes a value of an option from a text."""
    members = _members(_HINTS[option])
    if bool in members:
        return as_flag
    if int in members or float in members:
        return float if float in members else int
    return _as_list if any(get_origin(member) in (tuple, Mapping) for member in members) else str


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def as_flag(word: str) -> bool:
    """A truth value; ValueError for every other text."""
    if word.lower() not in FLAGS:
        raise ValueError(word)
    return FLAGS[word.lower()]


def _as_list(word: str) -> tuple[str, ...]:
    """Several globs as one value: ``q_proj+v_proj``, in Python also ``q_proj,v_proj``."""
    return tuple(part.strip() for part in re.split("[+,]", word) if part.strip())


_HINTS: dict[str, Any] = get_type_hints(TrainingOptions)


# ---- The names of runs


def _name_of(point: Mapping[str, Any]) -> str:
    """The name of a run, from which its folder is made: ``rank=8_seed=0``.

    The order of the axes does not matter, so that the same run has the same name in every grid.
    """
    words = [f"{spell(option)}={_in_name(point[option])}" for option in _HINTS if option in point]
    return "_".join(words) or "run"


def _in_name(value: Any) -> str:
    text = value_text(value)
    # Of a path the last part, since the folder of a file does not matter.
    if isinstance(value, str | PathLike):
        text = Path(text).name or text
    safe = _UNSAFE.sub("-", text)[:LONGEST]
    # Values of which the name shows only a part differ in their digests.
    return safe if safe == text else f"{safe}-{sha256(text.encode(errors='replace')).hexdigest()[:6]}"


# ---- How values and options are written


def value_text(value: Any) -> str:
    """A value as it is written in ``--grid``, in ``runs.csv`` and in the name of a run."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, Mapping):
        return "+".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return "+".join(value) or "none"
    return str(value)


def spell(option: str) -> str:
    """The option as it is written on the command line."""
    return option.replace("_", "-")
