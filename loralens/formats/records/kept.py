"""Keeping an old undo file or certificate that lies outside of its model's folder until the model is replaced.

``.NAME.PID.MODEL.kept`` is the old file NAME. It is hard-linked before a run replaces the file and then the model.
MODEL is the inode of the old model. The two replacements cannot happen at once, so a run that is killed in between
leaves the new file with the old model. The inode shows that, and the next run restores the old file.
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from loralens.errors import place
from loralens.formats.files.disk import disk_errors, sync_folder
from loralens.formats.files.hold import lock
from loralens.formats.files.leftovers import claim, hidden_names, remove, tidy

_KEPT = re.compile(r"\.(?P<name>.+)\.(?P<pid>[0-9]+)\.(?P<model>[0-9]+)\.kept", re.DOTALL)


@contextmanager
def keep_files(files: Sequence[Path], model: Path) -> Iterator[None]:
    """Keep the files of the model at ``model`` for a block that replaces them and then the model.

    Afterwards the old files are removed; if the model was not replaced, they are restored.
    """
    with ExitStack() as stack:
        for file in files:
            stack.enter_context(_back_up(file, model))
        yield


@contextmanager
def _back_up(file: Path, model: Path) -> Iterator[None]:
    number = _number(model)
    # There is no old model or no old file, so nothing has to be kept.
    if number is None or not file.is_file():
        yield
        return
    # The inode is a part of the name, so no second file has to remember it.
    hidden = file.with_name(f".{file.name}.{os.getpid()}.{number}.kept")
    with place(file), disk_errors():
        remove(hidden)  # one of an earlier process with the same id; `restore_kept` has dealt with its content
        try:
            os.link(file, hidden)
        except OSError:  # the disk has no hard links
            shutil.copy2(file, hidden)
        sync_folder(file.parent)
    descriptor = lock(hidden)
    try:
        yield
    finally:
        _finish_backup(hidden, file, stands=_number(model) == number)
        if descriptor is not None:
            os.close(descriptor)


def restore_kept(file: Path, model: Path) -> None:
    """Restore what a killed run kept of ``file`` if its model was not replaced; otherwise remove it."""
    for hidden, pid, number in _leftovers(file):
        with claim(hidden, pid) as abandoned:
            if abandoned:
                tidy(model)  # the killed run may have moved the model aside
                _finish_backup(hidden, file, stands=_number(model) == number)


def _finish_backup(hidden: Path, file: Path, *, stands: bool) -> None:
    with place(file), disk_errors():
        # If both are the same file, it was not replaced yet.
        if stands and not (file.exists() and file.samefile(hidden)):
            hidden.replace(file)
        else:
            remove(hidden)


def _number(model: Path) -> int | None:
    """The inode of a file or folder, which a rename does not change; None if there is no such path."""
    try:
        return model.stat().st_ino
    except OSError:
        return None


def _leftovers(file: Path) -> list[tuple[Path, int, int]]:
    """What is kept of a file: the hidden path, the process id, and the inode of the model."""
    return [
        (file.with_name(match[0]), int(match["pid"]), int(match["model"]))
        for match in hidden_names(file.parent, _KEPT)
        if match["name"] == file.name and not file.with_name(match[0]).is_symlink()
    ]
