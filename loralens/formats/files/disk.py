"""Disk access: errors of the system as messages, checks of targets, and flushing to the disk."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, final

from loralens.errors import FormatError, MissingFileError, OptionError, place

HURRY = 1 << 24  # bytes after which the disk is told to write, which shortens the wait at the end from 0.35 to 0.07 s


@contextmanager
def disk_errors(path: Path | None = None) -> Iterator[None]:
    """Turn an OSError of the block into a FormatError, which names ``path`` if it is given."""
    try:
        yield
    except MissingFileError:  # an OSError that has its message already
        raise
    except OSError as error:
        fix = "check free space and permissions, or choose another place"
        refused = FormatError(f"cannot be written: {error.strerror or error}", fix=fix)
        raise (refused.at(str(path)) if path else refused) from error


def check_room(path: Path) -> None:
    """Refuse a target below a file, or in a folder that may not be written to; missing folders are accepted.

    `loralens.formats.files.atomic.reserve` makes the missing folders when the writing begins. This is all that a dry
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


def check_new_folder(path: Path) -> None:
    """Refuse a path where no folder can be made, such as a link to nothing. Other errors are those of `check_room`."""
    if path.is_symlink() and not path.exists():
        raise OptionError(f"{path}: is a link to nothing", fix="remove the link, or choose another target")
    check_room(path)


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
        for name in (*names, ""):
            _sync(Path(folder, name))
    if path.is_file():
        _sync(path)


def _sync(path: Path) -> None:
    # Not every system allows it for folders.
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, if the system allows it."""
    _sync(path)


# ---- Locks, which the system releases however the process ends


@final
class Hold:
    """The exclusive right to write in a folder, from `take` until `release` or the end of the process.

    It is a lock on the folder itself, so no file is written and nothing stays behind. If the system or the disk does
    not support locks, every folder can be taken.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    @property
    def is_taken(self) -> bool:
        """Whether this object holds a folder now."""
        return self._descriptor is not None

    def take(self, folder: Path) -> None:
        """Take an existing folder, unless this object holds it already; an OptionError if another process does."""
        if not self.is_taken:
            with place(folder):
                self._descriptor = lock_or_refuse(folder)

    def release(self) -> None:
        """Let other processes take the folder."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    __del__ = release


def check_free(folder: Path) -> None:
    """Refuse a folder that another process holds. The lock is shared, so several processes can check at once."""
    with place(folder):
        descriptor = lock_or_refuse(folder, shared=True)
    if descriptor is not None:
        os.close(descriptor)


def lock_or_refuse(path: Path, *, shared: bool = False, wait: bool = False) -> int | None:
    """`lock` a file or folder, or raise an OptionError if another process holds the lock."""
    try:
        return lock(path, shared=shared, wait=wait)
    except BlockingIOError as error:
        fix = "wait for its end, or choose another target"
        raise OptionError("a run is going on there at this moment", fix=fix) from error


def lock(path: Path, *, shared: bool = False, wait: bool = False) -> int | None:
    """Lock a file or folder until the returned descriptor is closed.

    None if the path cannot be opened, or the system or the disk has no locks. With ``wait``, another process that
    holds it is waited for; else it is a BlockingIOError.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        # O_NONBLOCK: opening a FIFO of this name would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None  # the caller meets the same error when it writes there, and reports it
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError) or not isinstance(error, OSError):
            raise
        return None  # the disk does not support locks
    return descriptor
