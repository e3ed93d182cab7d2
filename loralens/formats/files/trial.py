"""Finding out before hours of work whether a folder can be made in a place, by making one."""

import tempfile
from pathlib import Path

from loralens.errors import OptionError
from loralens.formats.files.disk import disk


def check_place(path: Path) -> None:
    """Refuse a path where no folder can be made. The folder of the trial is removed at once.

    Raises
    ------
    OptionError
        The path is a link to nothing.
    FormatError
        No folder can be made in the nearest existing folder above the path.
    """
    if path.is_symlink() and not path.exists():
        raise OptionError(f"{path}: is a link to nothing", fix="remove the link, or choose another target")
    ancestor = next(folder for folder in path.absolute().parents if folder.exists())
    with disk(path), tempfile.TemporaryDirectory(prefix=".trial-", dir=ancestor):
        pass
