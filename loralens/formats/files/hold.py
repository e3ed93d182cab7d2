"""Hold: a folder that one process alone works in; the system lets go of it however the process ends."""

import os
import weakref
from pathlib import Path
from typing import final

from loralens.errors import OptionError


@final
class Hold:
    """The right to write in a folder, from `take` until `release` or the end of the process.

    A lock on the folder itself: nothing is written, nothing stays behind. Where the system or the disk has no such
    locks, every folder can be taken.
    """

    def __init__(self) -> None:
        self._end: weakref.finalize[[int], Hold] | None = None

    @property
    def is_taken(self) -> bool:
        """Whether there is a folder that this holds."""
        return self._end is not None and self._end.alive

    def take(self, folder: Path) -> None:
        """Take a folder that exists, unless it is held by this already.

        Raises
        ------
        OptionError
            Another process holds it.
        """
        if not self.is_taken:
            descriptor = _lock_or_refuse(folder)
            if descriptor is not None:
                self._end = weakref.finalize(self, os.close, descriptor)

    def release(self) -> None:
        """Let others have it."""
        if self._end is not None:
            self._end()


def check_free(folder: Path) -> None:
    """Refuse a folder that another process holds; any number of processes may look at once."""
    descriptor = _lock_or_refuse(folder, shared=True)
    if descriptor is not None:
        os.close(descriptor)


def _lock_or_refuse(folder: Path, *, shared: bool = False) -> int | None:
    """The descriptor of a lock; None where there are none."""
    try:
        return lock(folder, shared=shared)
    except BlockingIOError as error:
        raise OptionError(
            f"{folder}: a run is going on there at this moment", fix="wait for its end, or choose another target"
        ) from error


def lock(path: Path, *, shared: bool = False) -> int | None:
    """The descriptor of a lock on a file or folder, which lasts until it is closed.

    None where there are no locks: on Windows, on some disks, or where the path cannot be opened.

    Raises
    ------
    BlockingIOError
        Somebody else has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO of this name must not make us wait
    except OSError:
        return None  # whoever writes there will say what is wrong
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None  # a disk without locks
    return descriptor
