"""Hidden files and folders beside a target while it is written, and those that a killed run leaves behind.

==================== ===============================================================================================
``.NAME.PID.part``   the new content, which takes the name of the target once it is complete
``.NAME.PID.old``    the old target, moved aside between the two renames that replace it
``.NAME.PID.pair``   a folder with the old weights, moved aside, and copies of the old files beside them
==================== ===============================================================================================

The process that writes holds a lock on each of them, and the system releases the locks however the process ends. So the
next run to the same target can tell which are abandoned: it removes them, and restores what had been moved aside and
not yet replaced. On a disk without locks, the process id in the name decides.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE, S_ISDIR, S_ISREG
from time import sleep

from loralens.errors import OptionError
from loralens.formats.files.container import CONFIG, RECORD
from loralens.formats.files.hold import lock

COMPANIONS = (CONFIG, f"{RECORD}.json")  # the files that may lie beside weights and belong to them
NONE = ".none"  # NAME.none in a .pair says that there was no file NAME
# A name may contain anything, also a line end, so DOTALL.
_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<pid>[0-9]+)\.(?P<end>old|part|pair)", re.DOTALL)
# Attempts to make a hidden file or folder. An attempt fails while another process tidies up, which takes far less than
# the half second of all attempts. All of them fail if a process with the same id, in another container, uses the name.
_ATTEMPTS = 50
_PAUSE = 0.01  # seconds between attempts


def hidden_path(target: Path, end: str) -> Path:
    """The hidden path of this process beside a target."""
    return target.parent / f".{target.name}.{os.getpid()}.{end}"


@contextmanager
def reserve(target: Path, *, folder: bool = False, end: str = "part") -> Iterator[Path]:
    """Make a hidden file or folder beside ``target``, which is removed after the block unless it was renamed.

    Folders on the way to the target are made, and stay even if the block fails.

    Raises
    ------
    OptionError
        A process with the same id, in another container, is writing to this target.
    OSError
        The disk reports an error.
    """
    path = hidden_path(target, end)
    # Only if the folder is missing: inside a read-only folder, some systems refuse mkdir even for a folder that exists.
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _make(path, folder=folder)
    # Nobody reads what is written while it is not complete, who could not read what it replaces.
    keep_mode(target, path, also=0o700 if folder else 0o600)
    try:
        yield path
    finally:
        remove(path)
        if descriptor is not None:
            os.close(descriptor)


def keep_mode(old: Path, new: Path, *, also: int = 0) -> None:
    """Give a new file or folder the permissions of the one that it replaces, if there is one; ``also`` are added."""
    with suppress(OSError):  # nothing is replaced, or the disk has no permissions
        mode = old.stat().st_mode
        # Everybody may write to a device, and may have written to a pipe.
        if S_ISREG(mode) or S_ISDIR(mode):
            new.chmod(S_IMODE(mode) | also)


def _make(path: Path, *, folder: bool) -> int | None:
    """Make a file or folder and lock it; returns the descriptor of the lock."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            sleep(_PAUSE)
        try:
            if folder:
                path.mkdir()
            else:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            descriptor = lock(path)
        except (FileExistsError, BlockingIOError):
            continue  # it belongs to another run, or another run is just removing it as abandoned
        # Without locks, only the name protects the file.
        if descriptor is None and os.path.lexists(path):
            return None
        if descriptor is not None:
            # Another process may have removed it before it was locked.
            if _is_at(path, descriptor):
                return descriptor
            os.close(descriptor)
    raise OptionError("another run is writing there at this moment", fix="wait for its end, or choose another target")


def tidy(target: Path) -> None:
    """Remove what killed runs left beside a target, and restore what they moved aside and did not replace."""
    for path in _places(target):
        tidy_folder(path.parent, {path.name}.__contains__)


def tidy_folder(folder: Path, is_target: Callable[[str], object]) -> None:
    """`tidy` every target in a folder whose name ``is_target`` accepts."""
    for path, target, pid, end in _leftovers(folder, is_target):
        with claim(path, pid) as abandoned:
            if not abandoned:
                continue
            if end == "pair":
                restore_pair(path, target)
            # If the target exists, the run was killed after its last rename, and the new one is complete.
            elif end == "old" and not os.path.lexists(target):
                path.rename(target)
            else:
                remove(path)


def check_alone(target: Path) -> None:
    """Refuse a target to which another process is writing.

    It is called after `reserve`, so that of two processes at least one meets the other.

    Raises
    ------
    OptionError
        Another process is writing to this target.
    """
    own = os.getpid()
    for attempt in range(_ATTEMPTS):
        tidy(target)  # what processes that have ended have left does not count
        others = {
            pid: hidden
            for path in _places(target)
            for hidden, _, pid, end in _leftovers(path.parent, {path.name}.__contains__)
            if end == "part" and pid != own  # threads of one process are kept apart by `reserve`
        }
        if not others:
            return
        # Of two that began together one goes on: the one with the larger id gives way, and the other one waits for it.
        if min(others) < own or attempt == _ATTEMPTS - 1:
            what = f"another run is writing there at this moment, into {others[min(others)].name}"
            raise OptionError(what, fix="wait for its end, or choose another target")
        sleep(_PAUSE)


def is_moved_aside(target: Path) -> bool:
    """Whether a killed run left a target under a hidden name, from which `tidy` will restore it."""
    leftovers = [leftover for path in _places(target) for leftover in _leftovers(path.parent, {path.name}.__contains__)]
    return not target.exists() and any(end in ("old", "pair") for *_, end in leftovers)


def was_killed(target: Path) -> bool:
    """Whether a run that wrote a target was killed, and no later run to the same target has tidied up."""
    for path in _places(target):
        for hidden, _, pid, end in _leftovers(path.parent, {path.name}.__contains__):
            with claim(hidden, pid) as abandoned:
                if abandoned and end == "part":
                    return True
    return False


def _places(target: Path) -> set[Path]:
    """A target and the path that it links to: if a folder is a link, the folder to which it links is replaced."""
    return {path for path in (target, Path(os.path.realpath(target))) if path.name}


def _leftovers(folder: Path, is_target: Callable[[str], object]) -> list[tuple[Path, Path, int, str]]:
    """Hidden names in a folder: the path, the target beside it, the process id, and the end of the name."""
    return [
        (folder / match[0], folder / match["name"], int(match["pid"]), match["end"])
        for match in hidden_names(folder, _HIDDEN)
        if is_target(match["name"])
    ]


def hidden_names(folder: Path, pattern: re.Pattern[str]) -> list[re.Match[str]]:
    """The hidden names in a folder that match a pattern as a whole, sorted."""
    try:
        names = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
    except OSError:
        return []  # the caller meets the same error when it writes there, and reports it
    return [match for match in map(pattern.fullmatch, names) if match]


@contextmanager
def claim(path: Path, pid: int) -> Iterator[bool]:
    """Tell whether a hidden path is abandoned; no other process can take it during the block."""
    try:
        descriptor = lock(path)
    except BlockingIOError:
        yield False
        return
    # Without locks a process id in the name is all there is; it may belong to another process by now.
    if descriptor is None:
        yield os.path.lexists(path) and not _is_alive(pid)
        return
    try:
        yield _is_at(path, descriptor)
    finally:
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a path still names the opened file, which may have been removed or replaced before it was locked."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _is_alive(pid: int) -> bool:
    """Whether a process with this id runs. What it writes must not be removed."""
    try:
        os.kill(pid, 0)  # signal 0 is never delivered; the call only checks that the process exists
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # it exists and belongs to another user
    return True


def restore_pair(pair: Path, weights: Path) -> None:
    """Restore first the files beside the weights and then the weights, if these were moved aside and not replaced."""
    # The weights come last: until then no adapter can be loaded, so none is loaded with the wrong configuration.
    if os.path.lexists(pair / weights.name) and not os.path.lexists(weights):
        for name in COMPANIONS:
            if os.path.lexists(pair / name):
                (pair / name).replace(weights.with_name(name))
            elif os.path.lexists(pair / f"{name}{NONE}"):
                weights.with_name(name).unlink(missing_ok=True)
        (pair / weights.name).rename(weights)
    remove(pair)


def remove(path: Path) -> None:
    """Remove a file, or a folder with everything in it, as far as the system allows."""
    if path.is_dir() and not path.is_symlink():
        import shutil  # it brings the modules of three compressions, and leftovers are rare

        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
