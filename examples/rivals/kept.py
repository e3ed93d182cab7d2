"""Results that are kept as JSON, so that a study that was interrupted makes only what is missing."""

import json
from pathlib import Path
from typing import Any

from loralens.formats.files.atomic import atomic_file


def finished(path: Path, told: dict[str, Any]) -> dict[str, Any] | None:
    """The kept result of a job, or None if there is none or it was made with other arguments."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if all(found.get(name) == value for name, value in told.items()) else None


def keep(path: Path, result: dict[str, Any]) -> None:
    """Write a result atomically: the file is complete, or it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:
        stream.write((json.dumps(result, indent=1) + "\n").encode())
