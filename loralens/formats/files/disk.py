"""The disk: its errors as messages, places that it cannot write to, and waiting until it has what was written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from loralens.errors import FormatError, OptionError


@contextmanager
def disk(path: Path | None = None) -> Iterator[None]:
    """An OSError of the block as a message, which names ``path`` where one is given."""
    try:
        yield
    except OSError as error:
        refused = FormatError(
            f"cannot be written: {error.strerror or error}",
            fix="check free space and permissions, or choose another place",
        )
        raise (refused.at(str(path)) if path else refused) from error


def check_parent(path: Path) -> None:
    """Refuse a file whose folder is not there."""
    if not path.parent.is_dir():
        raise OptionError(f"{path.parent}: no such folder", fix="make the folder first")


def check_room(path: Path) -> None:
    """Refuse a place under a file, or in a folder that may not be written to: what a dry run can know of the disk."""
    ancestor = next(folder for folder in path.absolute().parents if folder.exists())
    if not ancestor.is_dir():
        raise OptionError(f"{ancestor}: is a file, not a folder", fix="choose another target")
    if not os.access(ancestor, os.W_OK):
        raise OptionError(f"{ancestor}: may not be written to", fix="choose another target, or change its permissions")


def flush(stream: BinaryIO) -> None:
    """Wait until what was written is on the disk, or the disk has refused it."""
    stream.flush()
    os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or everything in a folder, is on the disk."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            _sync_file(Path(folder) / name)
        sync_folder(Path(folder))
    if path.is_file():
        _sync_file(path)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system lets folders be opened."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
