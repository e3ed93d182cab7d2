"""When files were first indexed, kept while an index is made anew."""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from loralens.errors import LoraLensError
from loralens.fleet.catalogue.schema import DATES, NEXT_DATES, open_unchecked, read_rows, read_small
from loralens.formats.files.disk import replace_text

_DATE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")


def keep_dates(home: Path) -> bool:
    """Write the dates of a catalogue that is made anew into a file of their own; returns whether it has some.

    The catalogue may be of another version, or damaged. So what can be read is taken over, and the rest is not known.
    """
    dates: dict[str, str] = {}
    # If it is damaged, what was read before the damage is kept.
    with suppress(LoraLensError), open_unchecked(home) as connection:
        table = "select sql from sqlite_master where name = 'files'"
        # A view would be run, for as long as it takes.
        if all(str(sql).startswith("CREATE TABLE files(") for (sql,) in read_rows(connection, home, table)):
            for path, added in read_rows(connection, home, "select path, added from files"):
                if isinstance(path, str | bytes) and isinstance(added, str) and _DATE.fullmatch(added):
                    dates[os.fsencode(path).hex()] = added
    if dates:
        # The dates are in a file, so that they stay if this process is killed before the new index is complete.
        replace_text(home / DATES, json.dumps(dates), part=home / NEXT_DATES)
    return (home / DATES).exists()


def kept_dates(home: Path) -> Mapping[str, str]:
    """Path → when the file was first indexed, of an index that is being made anew; otherwise empty."""
    try:
        dates = read_small(home / DATES)
        return {os.fsdecode(bytes.fromhex(path)): added for path, added in dates.items() if _DATE.fullmatch(added)}
    except (OSError, ValueError, TypeError, AttributeError):
        # There is none, or it may hold anything after a power failure.
        return {}


def forget_dates(home: Path) -> None:
    """Remove the file, since the new index has them now."""
    (home / DATES).unlink(missing_ok=True)
