"""The verb ``fleet``: opens the index for the sub-commands of ``loralens fleet``."""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loralens.fleet.fleet import Fleet


def open_fleet(home: str | PathLike[str]) -> "Fleet":
    """Open an index for a command, and note if the files have changed since it was made.

    Raises
    ------
    OptionError
        There is no index, or this version cannot read it.
    """
    from loralens.fleet.fleet import Fleet

    return Fleet.open(home)
