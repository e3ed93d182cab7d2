"""The other files of a folder that is replaced: they come along into the new one, hard-linked where the disk can."""

import os
import shutil
from collections.abc import Container
from contextlib import suppress
from pathlib import Path


def bring_others(old: Path, new: Path, *, without: Container[str] = ()) -> None:
    """Add every file of ``old`` to ``new`` that is not there yet, except those named in ``without``.

    ``old`` is not changed. Links stay links; relative ones keep their meaning if both folders have the same parent.
    """
    for source in sorted(old.iterdir()):
        target = new / source.name
        if source.name in without:
            continue
        if source.is_dir() and not source.is_symlink():
            created = not os.path.lexists(target)
            if created:
                target.mkdir()
            bring_others(source, target)
            if created:  # last, because adding files to the folder changes its time
                shutil.copystat(source, target)
        elif not os.path.lexists(target):
            _bring(source, target)


def _bring(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    # A hard link takes no room and no time for large files. Some disks have none, and none leads to another disk.
    with suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)
