"""Disk access: errors of the system as messages, checks of targets, and flushing to the disk."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import UnsupportedOperation
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

from loralens.errors import FormatError, OptionError
from loralens.formats.files.walking import folders

HURRY = 1 << 24  # bytes after which the disk is told to write, which shortens the wait at the end from 0.35 to 0.07 s


@contextmanager
def disk_errors(path: Path | None = None) -> Iterator[None]:
    """Turn an OSError of the block into a FormatError, which names ``path`` if it is given."""
    try:
        yield
    except OSError as error:
        fix = "check free space and permissions, or choose another place"
        refused = FormatError(f"cannot be written: {error.strerror or error}", fix=fix)
        raise (refused.at(str(path)) if path else refused) from error


def check_room(path: Path) -> None:
    """Refuse a target below a file, or in a folder that may not be written to; missing folders are accepted.

    `loralens.formats.files.leftovers.reserve` makes the missing folders when the writing begins. This is all that a dry
    run checks on the disk.
    """
    # lexists: where a link leads nowhere, no folder can be made.
    ancestor = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not ancestor.exists():
        raise OptionError(f"{ancestor}: is a link to nothing", fix="remove the link, or choose another target")
    if not ancestor.is_dir():
        raise OptionError(f"{ancestor}: is a file, not a folder", fix="choose another target")
    # Root may write anywhere, so for root this never refuses.
    if not os.access(ancestor, os.W_OK):
        raise OptionError(f"{ancestor}: may not be written to", fix="choose another target, or change its permissions")


def flush(stream: BinaryIO) -> None:
    """Wait until the written bytes are on the disk, or until the disk reports an error."""
    stream.flush()
    os.fsync(stream.fileno())


def start_writeback(descriptor: int, offset: int, count: int) -> None:
    """Tell the disk to begin writing whenever another `HURRY` bytes of the file are complete, without waiting."""
    # DONTNEED starts the writeback of the range on Linux.
    first, last = offset // HURRY * HURRY, (offset + count) // HURRY * HURRY
    if first < last and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, first, last - first, os.POSIX_FADV_DONTNEED)


def release_pages(path: Path) -> None:
    """Tell the system that a file, or the files of a folder, will not be read again: they are about to be replaced.

    The system keeps what was read or written in memory. The new files then take this memory instead of further memory,
    which a virtual machine must first get from its host: that took up to 7 s of CPU time for 1.6 GB. Nothing on the
    disk changes. Links are left alone, and files with a second name, which may be that of the base.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    # A file that cannot be looked at is replaced all the same.
    with suppress(OSError):
        found = folders(path, without=lambda _: False) if path.is_dir() else [(path.parent, [path.name])]
        for folder, names in found:
            for name in names:
                _release_file(folder / name)


def _release_file(file: Path) -> None:
    with suppress(OSError):
        status = file.lstat()
        if not S_ISREG(status.st_mode) or status.st_nlink > 1:
            return
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def hurried(pieces: Iterable[memoryview], stream: BinaryIO) -> Iterator[memoryview]:
    """Yield pieces that are written to a stream, and let the disk begin with the earlier ones meanwhile."""
    position = stream.tell()
    for piece in pieces:
        yield piece
        # A stream in memory has no descriptor.
        with suppress(UnsupportedOperation):
            start_writeback(stream.fileno(), position, piece.nbytes)
        position += piece.nbytes


def replace_text(path: Path, text: str, *, part: Path) -> None:
    """Write ASCII to a new file, ``part``, and let it take the place of another, without waiting for the disk.

    Neither is written to if it is there: somebody may have made it a link to another file.
    """
    with disk_errors(part):
        part.unlink(missing_ok=True)
        with part.open("x", encoding="ascii") as stream:
            stream.write(text)
        part.replace(path)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of the data at a position; one call of the system may write only a part."""
    view = memoryview(data)
    while len(view):
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def sync(path: Path) -> None:
    """Wait until a file, or everything in a folder, is on the disk."""
    # Files before their folder: a name must not reach the disk before the content that belongs to it.
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            _sync_file(Path(folder) / name)
        sync_folder(Path(folder))
    if path.is_file():
        _sync_file(path)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as stream:  # Windows flushes only files that are open for writing
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, if the system allows opening folders."""
    with suppress(OSError):  # Windows does not allow it
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_new_folder(path: Path) -> None:
    """Refuse a path where no folder can be made. A folder is made as a trial and removed at once.

    Raises
    ------
    OptionError
        The path is a link to nothing.
    FormatError
        No folder can be made in the nearest existing folder above the path.
    """
    # Making a folder at such a path would fail with a message about a file that exists.
    if path.is_symlink() and not path.exists():
        raise OptionError(f"{path}: is a link to nothing", fix="remove the link, or choose another target")
    ancestor = next(folder for folder in path.absolute().parents if folder.exists())
    from tempfile import TemporaryDirectory  # it imports random and shutil

    with disk_errors(path), TemporaryDirectory(prefix=".trial-", dir=ancestor):
        pass
