"""A file or folder that appears whole or not at all, whatever happens on the way.

It is written beside its target under a hidden name with the number of the process, and renamed once all of it is on the
disk. What stood there before is first renamed too, so that at every moment one of the two is whole, even where the
power fails; the next run tidies up after a killed one.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loralens.errors import FormatError, OptionError, place
from loralens.formats.writing import check_parent, disk


def check_target(root: Path, target: Path, *, overwrite: bool) -> None:
    """Refuse a target that exists, or that writing a copy of ``root`` to would harm ``root``."""
    base, here = root.resolve(), target.resolve()
    if here == base:
        raise OptionError("is the base itself", fix="choose another target: the base is never written to")
    if base in here.parents:
        raise OptionError("lies within the base", fix="choose a target outside: the base is never written to")
    if here in base.parents:
        raise OptionError("holds the base", fix="choose a target outside: the base is never written to")
    if target.exists() and not overwrite:
        raise OptionError("exists", fix="choose another target, or give --overwrite")
    if target.exists() and target.is_dir() != root.is_dir():
        raise OptionError("is not of the kind of the base", fix="give a folder for a folder, a file for a file")
    check_parent(target)


def check_space(target: Path, needed: int) -> None:
    """Refuse what the disk has no room for, now rather than after half an hour; a quota shows only when it is met."""
    free = shutil.disk_usage(target.absolute().parent).free
    if free < needed:
        raise FormatError(
            f"{target}: cannot be written: it takes {needed:,} bytes, and the disk has {free:,} left",
            fix="free some space, or choose another place",
        )


@contextmanager
def appearing(target: Path, *, folder: bool, overwrite: bool) -> Iterator[Path]:
    """Where to write what takes the place of ``target`` when the block ends well, and vanishes when it does not."""
    home = target.absolute().parent
    part = home / f".{target.name}.{os.getpid()}.part"
    old = home / f".{target.name}.{os.getpid()}.old"
    try:
        if folder:
            part.mkdir()
        yield part
        _sync(part)
        if overwrite and target.exists():
            target.rename(old)
        part.rename(target)
        _sync_folder(home)
        _remove(old)
    except OSError:
        with place(target), disk():
            raise
    finally:
        _remove(part)
        if old.exists() and not target.exists():
            old.rename(target)


def tidy(target: Path) -> None:
    """Remove what processes that were killed have left; put back what one had moved aside and not yet replaced."""
    home = target.absolute().parent
    name = re.compile(rf"\.{re.escape(target.name)}\.(?P<pid>[0-9]+)\.(?P<end>old|part)")
    there = sorted(home.iterdir()) if home.is_dir() else []
    for stale, found in ((path, name.fullmatch(path.name)) for path in there):
        if found is None or _alive(int(found["pid"])):
            continue
        if found["end"] == "old" and not target.exists():
            stale.rename(target)
        else:
            _remove(stale)


def _alive(pid: int) -> bool:
    """Whether a process of this number runs: what it writes is not ours to remove."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(path: Path) -> None:
    """Wait until a file, or everything in a folder, is on the disk."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            _sync_file(Path(folder) / name)
        _sync_folder(Path(folder))
    if path.is_file():
        _sync_file(path)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    """The names in a folder, where the system lets folders be opened."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
