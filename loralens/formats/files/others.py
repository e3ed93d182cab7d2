"""The other files of a folder that is replaced: they come along into the new one, hard-linked where the disk can."""

import os
import shutil
from collections.abc import Container
from contextlib import suppress
from pathlib import Path


def bring_others(old: Path, new: Path, *, without: Container[str] = ()) -> None:
    """Let ``new`` have every file of ``old`` that it has not, but for those named in ``without``.

    Nothing is taken from ``old``. Links stay links, and mean the same where both folders have the same parent.
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
            if created:
                shutil.copystat(source, target)
        elif not os.path.lexists(target):
            _bring(source, target)


def _bring(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    with suppress(OSError):  # a disk without hard links, or another disk
        os.link(source, target)
        return
    shutil.copy2(source, target)
