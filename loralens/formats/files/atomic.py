"""Writing a file or folder that appears complete or not at all, whatever interrupts the process.

The new file or folder is written beside its target, under a hidden name that contains the process id. It is renamed
once it is completely on the disk. If the target is a folder that exists, it is renamed out of the way first. So the old
or the new one is complete at every moment, even after a power failure. The next run removes the leftovers of a killed
one.
"""

import errno
import os
import shutil
from collections.abc import Callable, Collection, Container, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from loralens.errors import FormatError, OptionError, place
from loralens.formats.files.apart import Input, check_apart
from loralens.formats.files.disk import check_room, disk_errors, flush, sync, sync_folder
from loralens.formats.files.hold import lock_or_refuse
from loralens.formats.files.leftovers import check_alone, hidden_path, keep_mode, remove, reserve, tidy

# The errors of a rename if the target is a mount point (EBUSY, EXDEV), or if its folder may not be written to, or is
# sticky and belongs to another user (EACCES, EPERM).
_IMMOVABLE = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM)
# Those of a rename to a folder that has appeared at the target.
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)
_EXISTS_FIX = "choose another target, or give --overwrite"


class ImmovableError(Exception):
    """The old file or folder at a target cannot be renamed; it is unchanged."""


def check_write_target(target: Path, inputs: Collection[Input], *, folder: bool, overwrite: bool) -> None:
    """Refuse a target that exists or cannot be replaced, or that overlaps with an input.

    Raises
    ------
    OptionError
        The message says why.
    """
    check_apart(target, inputs)
    if target.exists() and not overwrite:
        raise OptionError("exists", fix=_EXISTS_FIX)
    if target.exists() and target.is_dir() != folder:
        what = next(iter(inputs))[0]
        kinds = "a folder, but {} is a file" if target.is_dir() else "a file, but {} is a folder"
        raise OptionError(f"is {kinds.format(what)}", fix="give a folder for a folder, a file for a file")
    # Otherwise the error would appear only at the final rename, possibly after hours of work.
    if target.is_dir() and (why := why_immovable(target)):
        raise OptionError(f"cannot be replaced: {why}", fix="choose another target")
    check_room(target)


def why_immovable(folder: Path) -> str | None:
    """The reason why a folder cannot be replaced, as far as it can be known beforehand; None if there is none.

    A process whose working directory is the folder would stay in the old one, which is removed.
    """
    real = Path(os.path.realpath(folder))
    with suppress(OSError):  # the working directory may have been removed
        working_folder = Path.cwd().resolve()
        if real == working_folder or real in working_folder.parents:
            return "the current directory is in it"
    # ismount compares the device with that of the parent folder, and finds no difference for a bound folder.
    if os.path.ismount(real) or _is_bound(real):
        return "a disk is mounted there"
    return None if os.access(real.parent, os.W_OK | os.X_OK) else "the folder it is in may not be written to"


def _is_bound(folder: Path) -> bool:
    """Whether a folder of the same disk is mounted (bound) there. Only Linux says so, in ``/proc/self/mountinfo``."""
    # That file writes blanks, tabs, line ends and backslashes of a path in octal (proc_pid_mountinfo(5)).
    name = "".join(f"\\{ord(letter):03o}" if letter in " \t\n\\" else letter for letter in str(folder))
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    # The fifth field is the mount point.
    return any(fields[4] == name for line in lines if len(fields := line.split(" ")) > 4)


def check_space(target: Path, needed: int) -> None:
    """Refuse to begin a long run whose result the disk has no room for. A quota of the user is not seen here."""
    free = shutil.disk_usage(target.absolute().parent).free
    if free < needed:
        what = f"cannot be written: it takes {needed:,} bytes, but the disk has {free:,} left"
        # `at`, since most callers name the target themselves, and a place that two callers add is named once.
        raise FormatError(what, fix="free some space, or choose another place").at(str(target))


def check_still_free(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that another run has written since `check_write_target`, or is writing now.

    It is called within the block of `atomic_path`.
    """
    with place(target):
        check_alone(target)
    check_not_written(target, overwrite=overwrite)


def check_not_written(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that another run has written since `check_write_target`."""
    if target.exists() and not overwrite:
        raise OptionError("another run has written there meanwhile", fix=_EXISTS_FIX).at(str(target))


@contextmanager
def atomic_path(
    target: Path, *, folder: bool, overwrite: bool, without: Collection[str] | None = None
) -> Iterator[Path]:
    """Give a path to write to, which takes the place of ``target`` when the block succeeds and is removed otherwise.

    Parameters
    ----------
    target : Path
        A link to a folder is followed: its other end is replaced.
    overwrite : bool
        Whether the target may exist.
    without : collection of str or None
        Names in the old folder that are not taken over into the new one. None: nothing is taken over.

    Raises
    ------
    OptionError
        Another run is writing there.
    FormatError
        The disk reports an error.
    ImmovableError
        Other files were to be taken over, and the old folder cannot be renamed.
    """
    with place(target):
        target = Path(os.path.realpath(target)) if folder and target.is_symlink() else target.absolute()
        try:
            # Beside the target, so that the rename stays on one disk.
            with reserve(target, folder=folder) as part:
                yield part
                sync(part)
                if overwrite:
                    for new in (part, *part.rglob("*")):
                        keep_mode(target / new.relative_to(part), new)
                # The new folder gets the other files before it takes the name, so that it is never seen without them.
                if without is not None:
                    bring_others(target, part, without=without)
                    sync_folder(part)
                # A file is replaced at once. A folder that is not empty cannot be, so it has to make way.
                with move_aside(target) if overwrite and folder else nullcontext() as old:
                    part.replace(target)
                    sync_folder(target.parent)
                    if without is not None and old:
                        bring_others(old, target, without=without)  # files that other processes wrote meanwhile
        except OSError as error:
            if without is not None and error.errno in _IMMOVABLE:
                raise ImmovableError from error
            # The system reports the last rename so, and neither space nor permissions would help.
            if folder and error.errno in _OCCUPIED and os.path.lexists(target):
                fix = "repeat the command, or choose another target" if overwrite else _EXISTS_FIX
                raise OptionError("another run has written there meanwhile", fix=fix) from error
            with disk_errors():
                raise


@contextmanager
def move_aside(target: Path) -> Iterator[Path | None]:
    """Move ``target`` aside for the block; gives its path during the block, or None if there is no target.

    Afterwards it is removed, or moved back if nothing has taken its place. If this run is killed, the next one moves it
    back.

    Raises
    ------
    OptionError
        Another run is using it.
    """
    # exists() would follow a link to nothing, which has to be moved aside too.
    if not os.path.lexists(target):
        yield None
        return
    descriptor = lock_or_refuse(
        target
    )  # without a lock, another run would mistake it for the leftovers of a killed run
    old = hidden_path(target, "old")
    try:
        target.rename(old)
        yield old
    finally:
        # Something has taken the place, so the old one is no longer needed.
        if os.path.lexists(target):
            remove(old)
        elif os.path.lexists(old):
            old.rename(target)
        if descriptor is not None:
            os.close(descriptor)


# Opens a stream for the file that will be at a path: `atomic_file` for a single file, `Staging.put` for several.
Put = Callable[[Path], AbstractContextManager[BinaryIO]]


@contextmanager
def atomic_file(path: Path, *, check: Callable[[Path], None] | None = None) -> Iterator[BinaryIO]:
    """Give a stream whose file takes the place of ``path`` when the block succeeds and is removed otherwise.

    ``check`` gets the path of the complete file before it takes its place. If it raises an error, nothing is replaced.
    An OSError of the block becomes a FormatError that names ``path``; other errors pass unchanged. Leftovers of killed
    runs that wrote the same file are removed.
    """
    with place(path), disk_errors():
        tidy(path)
        with reserve(path) as part:
            with part.open("wb") as stream:
                yield stream
                flush(stream)
            if check:
                check(part)
            keep_mode(path, part)
            part.replace(path)


def bring_others(old: Path, new: Path, *, without: Container[str] = ()) -> None:
    """Add to ``new`` every file of ``old`` that it does not have yet, except those named in ``without``.

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
        # A file that the new folder has already is newer.
        elif not os.path.lexists(target):
            _bring(source, target)


def _bring(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    # A hard link takes no room and no time, however large the file is. Some disks have no hard links, and no hard link
    # leads to another disk.
    with suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)
