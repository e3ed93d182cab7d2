"""Locks on files and folders, so that only one process works in a folder.

The system releases a lock however the process ends.
"""

import os
import weakref
from pathlib import Path
from typing import final

from loralens.errors import OptionError, place


@final
class Hold:
    """The exclusive right to write in a folder, from `take` until `release` or the end of the process.

    It is a lock on the folder itself, so no file is written and nothing stays behind. If the system or the disk does
    not support locks, every folder can be taken.
    """

    def __init__(self) -> None:
        self._end: weakref.finalize[[int], Hold] | None = None

    @property
    def is_taken(self) -> bool:
        """Whether this object holds a folder now."""
        return self._end is not None and self._end.alive

    def take(self, folder: Path) -> None:
        """Take an existing folder, unless this object holds it already.

        Raises
        ------
        OptionError
            Another process holds it.
        """
        if not self.is_taken:
            with place(folder):
                descriptor = lock_or_refuse(folder)
            if descriptor is not None:
                # The descriptor is closed with the object, also where nobody calls `release`.
                self._end = weakref.finalize(self, os.close, descriptor)

    def release(self) -> None:
        """Let other processes take the folder."""
        if self._end is not None:
            self._end()


def check_free(folder: Path) -> None:
    """Refuse a folder that another process holds. The lock is shared, so several processes can check at once."""
    with place(folder):
        descriptor = lock_or_refuse(folder, shared=True)
    if descriptor is not None:
        os.close(descriptor)


def lock_or_refuse(path: Path, *, shared: bool = False) -> int | None:
    """`lock` a file or folder, or raise an OptionError if another process holds the lock."""
    try:
        return lock(path, shared=shared)
    except BlockingIOError as error:
        fix = "wait for its end, or choose another target"
        raise OptionError("a run is going on there at this moment", fix=fix) from error


def lock(path: Path, *, shared: bool = False) -> int | None:
    """Lock a file or folder until the returned descriptor is closed.

    None if there are no locks: on Windows, on some disks, or if the path cannot be opened.

    Raises
    ------
    BlockingIOError
        Another process holds the lock.
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
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None  # the disk does not support locks
    return descriptor
