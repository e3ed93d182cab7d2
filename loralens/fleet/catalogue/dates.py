"""When files were first indexed, kept while an index is made anew."""

import json
import os
import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from loralens.core.json_depth import parse_json
from loralens.fleet.catalogue.schema import CATALOGUE
from loralens.formats.files.disk import disk_errors

DATES = "added.json"
_DATE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")


def keep_dates(home: Path) -> bool:
    """Write the dates of a catalogue that is made anew into a file of their own; returns whether it has some.

    The catalogue may be of another version, or damaged. So what can be read is taken over, and the rest is not known.
    """
    dates: dict[str, str] = {}
    address = f"file:{quote(str((home / CATALOGUE).absolute()))}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True)) as connection:
            # The views and triggers of a catalogue may come from elsewhere.
            connection.execute("pragma trusted_schema = off")
            for path, added in connection.execute("select path, added from files"):
                if isinstance(path, str | bytes) and isinstance(added, str) and _DATE.fullmatch(added):
                    dates[os.fsencode(path).hex()] = added
    except (sqlite3.Error, UnicodeError):
        pass  # damaged: what was read before the damage is kept
    if dates:
        # The dates are in a file, so that they stay if this process is killed before the new index is complete.
        part = home / f"{DATES}.new"
        with disk_errors(part):
            part.write_text(json.dumps(dates), encoding="ascii")
            part.replace(home / DATES)
    return (home / DATES).exists()


def kept_dates(home: Path) -> Mapping[str, str]:
    """Path → when the file was first indexed, of an index that is being made anew; otherwise empty."""
    try:
        dates = parse_json((home / DATES).read_text(encoding="ascii"))
        return {os.fsdecode(bytes.fromhex(path)): added for path, added in dates.items() if _DATE.fullmatch(added)}
    except (OSError, ValueError, TypeError, AttributeError):
        # There is none, or it may hold anything after a power failure.
        return {}


def forget_dates(home: Path) -> None:
    """Remove the file, since the new index has them now."""
    (home / DATES).unlink(missing_ok=True)
