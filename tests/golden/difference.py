"""Difference: where two records say different things, by JSON path."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
INFORMATION = {"command", "call"}  # how a case is asked may change; what it answers may not
MEASURED = {"norm", "sum"}  # of a tensor: for comparisons with a tolerance; else its digest says more
ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """One place where a record is not as it was."""

    kind: Literal["changed", "missing", "added"]
    path: str
    before: Any = None
    after: Any = None

    def __str__(self) -> str:
        if self.kind == "changed":
            return f"{self.path}: {_short(self.before)} → {_short(self.after)}"
        return f"{self.path}: {self.kind}, {_short(self.before if self.kind == 'missing' else self.after)}"


def differences(before: Any, after: Any, *, tolerance: float = 0.0, path: str = "") -> Iterator[Difference]:
    """All differences between two values as JSON has them.

    Parameters
    ----------
    before, after
        The values.
    tolerance
        Numbers, also those within texts, may differ by this part of the larger of them and of 1. Digests of what holds
        numbers are then not compared.
    path
        Where the values stand.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        yield from _of_objects(before, after, tolerance, path)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from differences(old, new, tolerance=tolerance, path=f"{path}[{i}]")
    elif isinstance(before, list) and isinstance(after, list):
        yield Difference("changed", path, *_first_apart(before, after))
    elif not _alike(before, after, tolerance):
        yield Difference("changed", path, before, after)


def _of_objects(before: dict[str, Any], after: dict[str, Any], tolerance: float, path: str) -> Iterator[Difference]:
    met = False
    for key in [*before, *(key for key in after if key not in before)]:
        if key in INFORMATION or key == "sha256" or (key in MEASURED and not tolerance and "sha256" in before):
            continue
        old, new, where = before.get(key, ABSENT), after.get(key, ABSENT), f"{path}.{key}" if path else key
        if new is ABSENT:
            found = [Difference("missing", where, before=old)]
        elif old is ABSENT:
            found = [Difference("added", where, after=new)]
        else:
            found = list(differences(old, new, tolerance=tolerance, path=where))
        met = met or bool(found)
        yield from found
    # A digest says something only where all that it is the digest of looks the same.
    if not met and before.get("sha256") != after.get("sha256") and not (tolerance and _numeric(before)):
        yield Difference("changed", f"{path}.sha256", before.get("sha256"), after.get("sha256"))


def _numeric(record: dict[str, Any]) -> bool:
    """Whether a digest is of something whose numbers were compared one by one, or cannot be."""
    return "norm" in record or record.get("kind") not in (None, "gguf")


def _alike(before: Any, after: Any, tolerance: float) -> bool:
    if type(before) is not type(after) and not (tolerance and _number(before) and _number(after)):
        return False
    if _number(before):
        return repr(before) == repr(after) or bool(tolerance and _near(before, after, tolerance))
    if tolerance and isinstance(before, str):
        numbers = [[float(text) for text in NUMBER.findall(value)] for value in (before, after)]
        same = NUMBER.sub("#", before) == NUMBER.sub("#", after)
        return same and all(_near(old, new, tolerance) for old, new in zip(*numbers, strict=True))
    return bool(before == after)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _near(before: float, after: float, tolerance: float) -> bool:
    return math.isclose(before, after, rel_tol=tolerance, abs_tol=tolerance)


def _first_apart(before: list[Any], after: list[Any]) -> tuple[str, str]:
    """Two lists of different lengths, by what they hold where they begin to differ."""
    apart = next((i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), None)
    i = min(len(before), len(after)) if apart is None else apart
    return tuple(
        f"{len(part)} entries, [{i}] {_short(part[i]) if i < len(part) else 'none'}" for part in (before, after)
    )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 160 else f"{text[:120]}… ({len(text)} characters)"
