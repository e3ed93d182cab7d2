"""Whether rows of a catalogue are such as an update writes them: an index may be damaged, or come from anywhere."""

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import isfinite
from sys import float_info
from typing import Any

from loralens.core.stored import parse_json
from loralens.formats.files.json_text import finite_number, plain_text

MOST_SLOTS = 1 << 31  # a file of so many slots would have 9 TB
LONGEST_PATH = 4096  # letters; Linux opens no file by a longer path


def check_values(values: Sequence[object], kinds: Sequence[Callable[[Any], bool]]) -> None:
    """Raise a ValueError if a value of a row is not of its kind."""
    for value, kind in zip(values, kinds, strict=True):
        if not kind(value):
            raise ValueError(f"{value!r:.40}")


def check_columns(rows: Sequence[Sequence[object]], kinds: Sequence[Callable[[Any], bool]]) -> None:
    """Raise a ValueError if a value of any row is not of its kind. Columns are checked, which takes half the time."""
    for column, kind in zip(zip(*rows, strict=True), kinds, strict=bool(rows)):
        if not all(map(kind, column)):
            raise ValueError(f"{next(value for value in column if not kind(value))!r:.40}")


def decode_list(text: object) -> tuple[Any, ...]:
    """A list that is stored as JSON.

    Raises
    ------
    ValueError
        It is no list.
    """
    if not isinstance(text, str):
        raise ValueError("not a text")  # noqa: TRY004 - what is wrong is the content of a file
    decoded = parse_json(text)
    if not isinstance(decoded, list):
        raise ValueError("not a list")  # noqa: TRY004 - as above
    return tuple(decoded)


# Most adapters of a fleet have the same few lists of ranks, scales and findings.
decode_again = lru_cache(maxsize=256)(decode_list)


def is_whole(value: object) -> bool:
    """Whether it is a whole number that is not negative."""
    return type(value) is int and value >= 0


def is_slot(value: object) -> bool:
    """Whether it is the number of a slot."""
    return is_whole(value) and value < MOST_SLOTS  # type: ignore[operator]


def is_size(value: object) -> bool:
    """Whether it is a number that a norm, a step or a rank can be."""
    number = finite_number(value)
    return number is not None and number >= 0


def is_text(value: object) -> bool:
    """Whether it is a text."""
    return isinstance(value, str)


def is_status(value: object) -> bool:
    """Whether it is what an update states of a file."""
    return value in ("adapter", "unreadable", "other")


def is_base_or_nothing(value: object) -> bool:
    """Whether it is the name of a base as readers accept it, or missing."""
    return value is None or plain_text(value) is not None


def is_name(value: object) -> bool:
    """Whether it is a path or a name as they are stored: text or bytes."""
    if not isinstance(value, str | bytes) or len(value) > LONGEST_PATH:
        return False
    return (b"\0" if isinstance(value, bytes) else "\0") not in value  # type: ignore[operator]


def are_ranks(text: object) -> bool:
    """Whether it is a list of ranks, with at least one."""
    ranks = decode_again(text)
    return bool(ranks) and all(map(is_whole, ranks))


def are_scales(text: object) -> bool:
    """Whether it is a list of finite numbers."""
    return all(finite_number(scale) is not None for scale in decode_again(text))


def are_sizes(numbers: Sequence[object]) -> bool:
    """Whether they can be norms; there are many, so they are looked at together."""
    if not numbers or not {type(number) for number in numbers} <= {int, float}:
        return not numbers
    # A whole number may be beyond all floats, and the sum shows a NaN.
    return 0 <= min(numbers) <= max(numbers) <= float_info.max and isfinite(sum(map(float, numbers)))  # type: ignore[arg-type, type-var, operator]


def are_texts(text: object) -> bool:
    """Whether it is a list of texts."""
    return all(map(is_text, decode_again(text)))


def are_modules(text: object) -> bool:
    """Whether it is a list of modules: key, name, out and in of each."""
    return all(
        isinstance(module, list)
        and len(module) == 4
        and all(map(is_text, module[:2]))
        and all(map(is_whole, module[2:]))
        for module in decode_list(text)
    )


def leads_out(path: str) -> bool:
    """Whether a path may lead out of the folder that it is joined to."""
    drive, path_on_drive = os.path.splitdrive(path)
    return (
        bool(drive) or path_on_drive.startswith(("/", "\\")) or os.pardir in path_on_drive.replace("\\", "/").split("/")
    )
