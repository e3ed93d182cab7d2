"""Trial: whether something new can be made in a place, found out by making it before hours of work."""

import tempfile
from pathlib import Path

from loralens.errors import OptionError
from loralens.formats.files.disk import disk


def check_place(path: Path) -> None:
    """Refuse a path where no folder can be made; what is made for the trial is gone at once.

    Raises
    ------
    OptionError
        It is a link to nothing.
    FormatError
        The system does not make a folder in the nearest folder above it that is there.
    """
    if path.is_symlink() and not path.exists():
        raise OptionError(f"{path}: is a link to nothing", fix="remove the link, or choose another target")
    ancestor = next(folder for folder in path.absolute().parents if folder.exists())
    with disk(path), tempfile.TemporaryDirectory(prefix=".trial-", dir=ancestor):
        pass
