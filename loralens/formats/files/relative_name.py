"""Names of files that come out of other files: relative paths of plain parts, and where in a folder they lie.

An index names shards, an undo file the files that it restores, a zip archive its members. Whoever wrote them may mean
harm, so one rule holds for all: the name is a relative path, and every part of it is a plain name.
"""

import os
from pathlib import Path, PureWindowsPath
from typing import TypeGuard

from loralens.errors import FormatError

LONGEST_NAME, LONGEST_PATH = 255, 1024  # beyond these the system raises errors of its own


def is_relative_name(name: object) -> TypeGuard[str]:
    """Whether a name is a relative path whose every part is plain.

    No part is empty, ``.`` or ``..``, longer than file systems have names, or holds a backslash, a NUL, the drive of
    Windows or what no name can be encoded from: on every system the name then means the same file, which lies below
    the folder that it is joined to.
    """
    if not isinstance(name, str) or "\\" in name or "\0" in name or len(name) > LONGEST_PATH:
        return False
    try:
        lengths = [len(os.fsencode(part)) for part in name.split("/")]
    except UnicodeEncodeError:  # half a surrogate pair that is no byte of a path
        return False
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") and not PureWindowsPath(part).drive for part in parts)
    return plain and max(lengths) <= LONGEST_NAME


def check_relative_name(name: object, *, fix: str) -> None:
    """Refuse a name that `is_relative_name` does not accept.

    Raises
    ------
    FormatError
        It names the name.
    """
    if not is_relative_name(name):
        raise FormatError(f"{name!a:.100} is not the relative path of a file within the folder", fix=fix)


def path_to_write(folder: Path, name: str) -> Path:
    """Where a file of this name is written in a folder of our own.

    Links in a folder that is read are followed, as the cache of the Hub consists of them. In one that is written there
    are none: the name comes out of a file, and a link could lead anywhere.

    Raises
    ------
    FormatError
        The name is not a relative path of plain parts, or a part of it is a link.
    """
    fix = "use another copy of the file that this name comes from"
    check_relative_name(name, fix=fix)
    path = folder / name
    if os.path.realpath(path) != str(Path(os.path.realpath(folder)) / name):
        raise FormatError(f"{name!a:.100} leads out of the folder by a link", fix=fix)
    return path
