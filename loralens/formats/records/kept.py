"""Kept: an undo file or certificate outside the model's folder, until another model has taken the place of its own.

``.NAME.PID.MODEL.kept`` is the file that stood at NAME, hard-linked before a run replaces it and then the model; MODEL
is the number by which the disk knows the model that stood there. Two places cannot change at once: a run that is killed
in between leaves the new file beside the old model. The number tells so, and the next run puts the old file back.
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from loralens.errors import place
from loralens.formats.files.disk import disk, sync_folder
from loralens.formats.files.hold import lock
from loralens.formats.files.leftovers import claim, remove, tidy

_KEPT = re.compile(r"\.(?P<name>.+)\.(?P<pid>[0-9]+)\.(?P<model>[0-9]+)\.kept", re.DOTALL)


@contextmanager
def keeping(files: Sequence[Path], model: Path) -> Iterator[None]:
    """Keep files that belong to the model at ``model`` for a block in which others replace them, and then the model.

    Afterwards the old ones are gone; they are back where no other model stands there.
    """
    with ExitStack() as stack:
        for file in files:
            stack.enter_context(_back_up(file, model))
        yield


@contextmanager
def _back_up(file: Path, model: Path) -> Iterator[None]:
    number = _number(model)
    if number is None or not file.is_file():
        yield
        return
    hidden = file.with_name(f".{file.name}.{os.getpid()}.{number}.kept")
    with place(file), disk():
        remove(hidden)  # of an earlier process of this number, which has been settled
        try:
            os.link(file, hidden)
        except OSError:  # a disk without hard links
            shutil.copy2(file, hidden)
        sync_folder(file.parent)
    descriptor = lock(hidden)
    try:
        yield
    finally:
        _finish_backup(hidden, file, stands=_number(model) == number)
        if descriptor is not None:
            os.close(descriptor)


def settle(file: Path, model: Path) -> None:
    """Put back what a killed run kept of ``file``, if the model that it belongs to still stands; else remove it."""
    for hidden, pid, number in _leftovers(file):
        with claim(hidden, pid) as abandoned:
            if abandoned:
                tidy(model)  # which may be moved aside
                _finish_backup(hidden, file, stands=_number(model) == number)


def _finish_backup(hidden: Path, file: Path, *, stands: bool) -> None:
    with place(file), disk():
        if stands and not (file.exists() and file.samefile(hidden)):
            hidden.replace(file)
        else:
            remove(hidden)


def _number(model: Path) -> int | None:
    """The number of a file or folder on its disk, which it keeps when it is renamed; None where nothing stands."""
    try:
        return model.stat().st_ino
    except OSError:
        return None


def _leftovers(file: Path) -> list[tuple[Path, int, int]]:
    """What is kept of a file: where, by which process, and the number of the model."""
    try:
        names = sorted(path.name for path in file.parent.iterdir())
    except OSError:
        return []  # whoever writes there will say what is wrong
    matches = [match for name in names if name.endswith(".kept") and (match := _KEPT.fullmatch(name))]
    ours = [(file.with_name(match[0]), match) for match in matches if match["name"] == file.name]
    return [(path, int(match["pid"]), int(match["model"])) for path, match in ours if not path.is_symlink()]
