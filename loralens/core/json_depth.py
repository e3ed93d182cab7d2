"""The one reader of JSON from outside: it refuses values that are nested so deeply that code would fail on them."""

import json
from collections.abc import Callable
from typing import Any

# Far more than any file of the field has, and few enough for every function that calls itself for the parts of a value,
# such as `copy.deepcopy`, which Python stops after 1,000 calls.
DEEPEST = 64
_TOO_DEEP = f"nested more than {DEEPEST} levels deep"


def parse_json(
    text: str | bytes, *, object_pairs_hook: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None
) -> Any:
    """The value of a JSON text; ``object_pairs_hook`` is that of `json.loads`.

    Raises
    ------
    ValueError
        The text is not JSON, or it is nested more than `DEEPEST` levels deep.
    """
    try:
        value = json.loads(text, object_pairs_hook=object_pairs_hook)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    level: list[Any] = [[value]]
    # Level by level, because the check must not call itself either. `type`, because it is faster than isinstance, and
    # the header of a large file has a million values.
    for _ in range(DEEPEST + 1):
        level = [
            part
            for item in level
            for part in (item if type(item) is list else item.values())
            if type(part) is list or type(part) is dict
        ]
        if not level:
            return value
    raise ValueError(_TOO_DEEP)
