"""Checks of file names that are read from other files, which may come from an attacker.

An index names shards, an undo file names the files that it restores, and a zip archive names its members. One rule
holds for all of them: the name is a relative path, and every part of it is a plain name.
"""

import os
from pathlib import Path, PureWindowsPath
from typing import TypeGuard

from loralens.errors import FormatError

# Bytes of one name, which common file systems limit to 255, and characters of a path, which macOS limits to 1,024.
# Beyond these the system would raise errors of its own.
LONGEST_NAME, LONGEST_PATH = 255, 1024


def is_relative_name(name: object) -> TypeGuard[str]:
    """Whether a name is a relative path of plain parts.

    No part is empty, ``.`` or ``..``, or longer than the names of file systems; none has a backslash, a NUL, a drive
    of Windows, or a character that cannot be encoded. On every system such a name then means the same file, and that
    file lies below the folder that the name is joined to.
    """
    if not isinstance(name, str) or "\\" in name or "\0" in name or len(name) > LONGEST_PATH:
        return False
    parts = name.split("/")
    try:
        longest = max(len(os.fsencode(part)) for part in parts)
    except UnicodeEncodeError:  # a lone surrogate that does not stand for a byte of a path
        return False
    # A drive is checked on every system, so that a file is valid everywhere or nowhere.
    plain = all(part not in ("", ".", "..") and not PureWindowsPath(part).drive for part in parts)
    return plain and longest <= LONGEST_NAME


def check_relative_name(name: object, *, fix: str) -> None:
    """Refuse a name that `is_relative_name` does not accept.

    Raises
    ------
    FormatError
        The message shows the name.
    """
    if not is_relative_name(name):
        raise FormatError(f"{name!a:.100} is not the relative path of a file within the folder", fix=fix)


def path_to_write(folder: Path, name: str) -> Path:
    """The path of a file that is written under this name into a new folder.

    Links in a folder that is read are followed, because the cache of the Hub consists of links. In a folder that is
    written there must be none: the name comes from a file, and a link could lead anywhere.

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
