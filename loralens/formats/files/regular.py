"""Opening files from outside: the one way in which the package opens a file that somebody else may have made.

A path may be a pipe without a writer, whose opening would wait for ever, a link to ``/dev/zero``, which never ends, a
link to itself, or a folder. All of them are refused at once.
"""

import os
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

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
