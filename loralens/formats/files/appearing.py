"""A file or folder that appears whole or not at all, whatever happens on the way.

It is written beside its target under a hidden name with the number of the process, and renamed once all of it is on the
disk. What stood there before is first renamed too, so that at every moment one of the two is whole, even where the
power fails; the next run tidies up after a killed one.
"""

import errno
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from loralens.errors import FormatError, OptionError, place
from loralens.formats.files.apart import Input, check_apart
from loralens.formats.files.disk import check_parent, disk, sync, sync_folder
from loralens.formats.files.hold import lock
from loralens.formats.files.leftovers import hidden_path, remove, reserve
from loralens.formats.files.others import bring_others

_IMMOVABLE = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM)  # a mount point, a folder in another's sticky one


class ImmovableError(Exception):
    """What stands at a target cannot be renamed; it is where it was."""


def check_target(target: Path, inputs: Collection[Input], *, folder: bool, overwrite: bool) -> None:
    """Refuse a target that exists or cannot be replaced, or that writing to would harm what is read.

    Raises
    ------
    OptionError
        It says why.
    """
    check_apart(target, inputs)
    if target.exists() and not overwrite:
        raise OptionError("exists", fix="choose another target, or give --overwrite")
    if target.exists() and target.is_dir() != folder:
        what = next(iter(inputs))[0]
        raise OptionError(f"is not of the kind of {what}", fix="give a folder for a folder, a file for a file")
    check_parent(target)
    if target.is_dir() and (why := why_immovable(target)):
        raise OptionError(f"cannot be replaced: {why}", fix="choose another target")


def why_immovable(folder: Path) -> str | None:
    """Why a folder cannot be replaced by another one, as far as can be told before; None where nothing is known.

    Who stands in a folder stays in the old one when another takes its name, and the old one is removed.
    """
    real = Path(os.path.realpath(folder))
    with suppress(OSError):  # a working directory that is no more
        working_folder = Path.cwd().resolve()
        if real == working_folder or real in working_folder.parents:
            return "the current directory is in it"
    if os.path.ismount(real) or _is_bound(real):
        return "a disk is mounted there"
    return None if os.access(real.parent, os.W_OK | os.X_OK) else "the folder it is in may not be written to"


def _is_bound(folder: Path) -> bool:
    """Whether a folder of the same disk is mounted there, which Linux alone says, with blanks in octal."""
    name = "".join(f"\\{ord(letter):03o}" if letter in " \t\n\\" else letter for letter in str(folder))
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    return any(fields[4] == name for line in lines if len(fields := line.split(" ")) > 4)


def check_space(target: Path, needed: int) -> None:
    """Refuse what the disk has no room for, now rather than after half an hour; a quota shows only when it is met."""
    free = shutil.disk_usage(target.absolute().parent).free
    if free < needed:
        raise FormatError(
            f"{target}: cannot be written: it takes {needed:,} bytes, and the disk has {free:,} left",
            fix="free some space, or choose another place",
        )


@contextmanager
def appearing(target: Path, *, folder: bool, overwrite: bool, without: Collection[str] | None = None) -> Iterator[Path]:
    """Where to write what takes the place of ``target`` when the block ends well, and vanishes when it does not.

    Parameters
    ----------
    target : Path
        A link to a folder is followed: its other end is replaced.
    folder : bool
    overwrite : bool
        Whether something may stand there.
    without : collection of str or None
        Names of the old folder that do not come along into the new one. None: nothing comes along.

    Raises
    ------
    OptionError
        Another run is writing there.
    FormatError
        The disk refuses.
    ImmovableError
        Other files were to come along, and what stands there cannot be renamed.
    """
    with place(target):
        target = Path(os.path.realpath(target)) if folder and target.is_symlink() else target.absolute()
        try:
            with reserve(target, folder=folder) as part:
                yield part
                sync(part)
                if without is not None:
                    shutil.copymode(target, part)
                    bring_others(target, part, without=without)
                    sync_folder(part)
                with move_aside(target) if overwrite else nullcontext() as old:
                    part.rename(target)
                    sync_folder(target.parent)
                    if without is not None and old:
                        bring_others(old, target, without=without)  # what others have written meanwhile
        except OSError as error:
            if without is not None and error.errno in _IMMOVABLE:
                raise ImmovableError from error
            with disk():
                raise


@contextmanager
def move_aside(target: Path) -> Iterator[Path | None]:
    """Move what stands at ``target`` aside for the block; where it is during it, or None where nothing stands there.

    It is gone afterwards, or back where nothing has taken its place. The next run puts it back if this one is killed.

    Raises
    ------
    OptionError
        Another run is at work in it.
    """
    if not os.path.lexists(target):
        yield None
        return
    try:
        descriptor = lock(target)  # so that no other run takes it for what a killed one left
    except BlockingIOError as error:
        fix = "wait for its end, or choose another target"
        raise OptionError("a run is going on there at this moment", fix=fix) from error
    old = hidden_path(target, "old")
    try:
        target.rename(old)
        yield old
    finally:
        if os.path.lexists(target):
            remove(old)
        elif os.path.lexists(old):
            old.rename(target)
        if descriptor is not None:
            os.close(descriptor)
