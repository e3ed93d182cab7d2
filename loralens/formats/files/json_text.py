"""JSON as loralens reads and writes it, and checks of the text and the numbers in it."""

import json
import re
from math import isfinite
from typing import Any

from loralens.core.stored import parse_json
from loralens.errors import UNPRINTABLE, FormatError

MOST_MEMORY = 420_000_000  # bytes that a JSON text may take when it is parsed, as `parsed_size` estimates them
NAME_LIMIT = 4096  # characters; far more than any module path, and little enough to be shown in a message

_SURROGATE = re.compile(r"[\ud800-\udfff]")


def parse_object(data: bytes, encoding: str, *, what: str, fix: str) -> dict[str, Any]:
    """Parse a JSON object; ``what`` names it in messages, and ``fix`` is their advice.

    Raises
    ------
    FormatError
        It is no JSON object, is too large or nested too deeply, or a name occurs twice or cannot be shown.
    """
    if parsed_size(data) > MOST_MEMORY:
        raise FormatError(f"{what}has too many values: they would take {parsed_size(data):,} bytes of memory", fix=fix)
    try:
        value = parse_json(data.decode(encoding), object_pairs_hook=unique_keys)
    except ValueError as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise FormatError(f"{what}is not valid JSON ({reason})", fix=fix) from error
    if not isinstance(value, dict):
        raise FormatError(f"{what}is not a JSON object", fix=fix)
    return value


def parsed_size(data: bytes | bytearray) -> int:
    """An upper limit of the bytes of memory that CPython needs to parse a JSON text.

    A name with its place in a mapping takes up to 250, and an empty list or mapping up to 90 (measured with 1.5 million
    of each). The text is copied once, with four bytes for each character if one of them needs that many.
    """
    text = len(data) * (2 if data.isascii() else 5)
    return text + 250 * data.count(b",") + 90 * (data.count(b"[") + data.count(b"{"))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build the mapping of a JSON object for `parse_json`, which would silently keep the last of two equal names.

    Names must be printable, because messages show them.
    """
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        check_printable(key)
        if key in mapping:
            raise FormatError(f"{key} appears twice", fix="take one of them out, or save the file again")
        mapping[key] = value
    return mapping


def check_printable(name: str) -> None:
    """Refuse a name that could move the cursor of a terminal, hide text, or fill the screen."""
    # The length is checked first, because the time of the search grows with it.
    if len(name) > NAME_LIMIT:
        raise FormatError(f"a name is {len(name):,} characters long: {name[:40]!a}…", fix="rename it")
    if not is_safe_text(name):
        raise FormatError(f"the name {name[:80]!a} holds control characters", fix="rename it: no tool writes these")


def is_safe_text(value: Any) -> bool:
    """Whether a value is text that can be shown: it neither moves the cursor of a terminal nor hides other text."""
    if not isinstance(value, str):
        return False
    # Nearly all text is printable, and isprintable is much faster than the regular expression.
    return value.isprintable() or not UNPRINTABLE.search(value)


def plain_text(value: Any) -> str | None:
    """A value that is only shown to people, such as the name of the base; None if it is not text that can be shown."""
    return value if is_safe_text(value) and 0 < len(value) <= NAME_LIMIT else None


def finite_number(value: Any) -> float | None:
    """The number as float64; None if it is not a number, is not finite, or is a whole number beyond float64."""
    if type(value) not in (int, float):  # isinstance would accept true and false
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if isfinite(number) else None


def dumps(value: Any) -> str:
    """JSON as loralens writes it everywhere: indented by two spaces, keys in their given order, and not only ASCII."""
    return json_text(value, indent=2) + "\n"


def json_text(value: Any, *, indent: int | None = None) -> str:
    """JSON that can be encoded as UTF-8: a lone surrogate (a byte of a path that is not UTF-8) becomes an escape."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    # Almost no text has a surrogate, and encoding would make two more copies of a text that may be long.
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def json_or_none(text: str | None) -> Any:
    """The value of an optional JSON text; None if the text is missing, not valid JSON, or nested too deeply."""
    try:
        return parse_json(text or "null")
    except ValueError:
        return None


def encodable(text: str) -> bool:
    """Whether UTF-8 can hold a text: it has no lone surrogates."""
    return not _SURROGATE.search(text)
