"""Paths and names that somebody else may have made: opening files, checking names, and walking through folders.

A path may be a pipe without a writer, whose opening would wait for ever, a link to ``/dev/zero``, which never ends, a
link to itself, or a folder: all of them are refused at once. An index names shards, an undo file the files that it
restores, and a zip archive its members: such a name is a relative path, and every part of it is a plain name.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path, PureWindowsPath
from stat import S_ISREG
from typing import BinaryIO, NamedTuple, TypeGuard

from loralens.errors import FormatError, place

NO_FILE = "is not a regular file"


def open_regular(path: Path) -> int:
    """The descriptor of a regular file that is open for reading; links are followed.

    Raises
    ------
    FormatError
        It cannot be opened, or is not a regular file. The path is not named in it: `place` of the caller does so.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for another process to write to it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:  # a ValueError for a path with a byte of zero
        what = f"cannot be opened: {getattr(error, 'strerror', None) or error}"
        raise FormatError(what, fix="check the path and its permissions") from error
    # A device or a pipe has no size, and its bytes are gone once they are read. Windows cannot open a folder at all.
    if not S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(NO_FILE, fix="give a file, or the folder that holds it")
    return descriptor


def open_stream(path: Path) -> BinaryIO:
    """A regular file as a stream of bytes; errors are those of `open_regular`, and name the path."""
    with place(path):
        return os.fdopen(open_regular(path), "rb")


def check_folder(folder: Path) -> None:
    """Refuse a folder with a pipe or a device in it or one level below, before a library opens the files in it itself.

    Links to nothing are left to the library, which does not wait for them.

    Raises
    ------
    FormatError
        It names the file.
    """
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise FormatError(NO_FILE, fix="remove it, or restore the file").at(str(path))


def read_whole(path: Path) -> bytes:
    """All bytes of a regular file; errors are those of `open_regular`, and name the path."""
    with open_stream(path) as stream, place(path):
        try:
            return stream.read()
        except OSError as error:
            fix = "check the disk, or copy the file again"
            raise FormatError(f"cannot be read: {error.strerror}", fix=fix) from error


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


class Listing(NamedTuple):
    """The path of a folder, the names of its files, links and pipes, and which of them are links; all sorted."""

    folder: str
    files: list[str]
    links: list[str]


def folders(
    root: Path,
    *,
    follow: bool = False,
    without: Callable[[str], bool],
    failed: Callable[[Path, OSError], object] | None = None,
) -> Iterator[tuple[Path, list[str]]]:
    """Every folder from ``root`` down, and the names of its files, links and pipes; parameters as in `listings`."""
    found = listings(root, follow=follow, without=without, failed=failed)
    return ((Path(listing.folder), listing.files) for listing in found)


def listings(
    root: Path,
    *,
    follow: bool = False,
    without: Callable[[str], bool],
    failed: Callable[[Path, OSError], object] | None = None,
) -> Iterator[Listing]:
    """Every folder from ``root`` down, and what it holds besides folders.

    `os.walk` of Python 3.11 is recursive and fails on a thousand nested folders.

    Parameters
    ----------
    root : Path
    follow : bool
        Follow links to folders too. A folder that is its own ancestor is left out, so that a loop ends.
    without : callable
        Takes the name of a folder, and returns whether the folder is left out.
    failed : callable, optional
        Takes a folder that cannot be listed, and the error. Such folders are left out.
    """
    # Texts, since joining two Paths takes ten times as long, and a collection has thousands of folders.
    pending = [(str(root), frozenset[tuple[int, int]]())]
    while pending:
        folder, ancestors = pending.pop()
        files: list[str] = []
        links: list[str] = []
        inner: list[str] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    is_folder = _is_folder(entry, follow=follow)
                    (inner if is_folder else files).append(entry.name)
                    if not is_folder and entry.is_symlink():
                        links.append(entry.name)
            status = os.stat(folder) if follow else None  # noqa: PTH116
        except OSError as error:
            # Permissions do not allow reading it, or its path is too long for the system.
            if failed:
                failed(Path(folder), error)
            continue
        number = (status.st_dev, status.st_ino) if status else None
        # a link to a folder above, which would never end
        if number in ancestors:
            continue
        yield Listing(folder, sorted(files), sorted(links))
        inner_ancestors = ancestors | {number} if number else ancestors
        chosen = [name for name in sorted(inner, reverse=True) if not without(name)]
        pending += [(os.path.join(folder, name), inner_ancestors) for name in chosen]  # noqa: PTH118


def _is_folder(entry: os.DirEntry[str], *, follow: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow)
    except OSError:
        return False
