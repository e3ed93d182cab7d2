"""Hidden files and folders beside a target while it is written, and what a killed run leaves of them.

==================== ===============================================================================================
``.NAME.PID.part``   what is being written, and takes the name of the target once it is whole
``.NAME.PID.old``    what stood at the target, moved aside between the two renames that replace it
``.NAME.PID.pair``   a folder: the weights that stood at the target, moved aside, and copies of what stood beside them
``.NAME.….kept``     what stood outside a model's folder and belongs to the model: `loralens.formats.records.kept`
==================== ===============================================================================================

The process that writes holds a lock on each of them, which the system lets go of however the process ends. So the next
run to the same target knows which are nobody's: it removes them, and puts back what had been moved aside and not yet
replaced. Where there are no locks, the number of the process has to tell.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import sleep

from loralens.errors import OptionError
from loralens.formats.files.container import CONFIG, RECORD
from loralens.formats.files.hold import lock

COMPANIONS = (CONFIG, f"{RECORD}.json")  # what may stand beside weights and belong to them
NONE = ".none"  # the end of a name in a .pair that says: nothing of this name stood there
_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<pid>[0-9]+)\.(?P<end>old|part|pair)", re.DOTALL)
_ATTEMPTS = 50  # to make a part: one is lost only where another process tidies at that very moment
_PAUSE = 0.01  # seconds between them


def hidden_path(target: Path, end: str) -> Path:
    """The hidden name of this process beside a target."""
    return target.parent / f".{target.name}.{os.getpid()}.{end}"


@contextmanager
def reserve(target: Path, *, folder: bool = False, end: str = "part") -> Iterator[Path]:
    """A new hidden file or folder beside ``target``, which is gone after the block unless it was renamed.

    Raises
    ------
    OptionError
        Another run of the same number, in another container, is writing to this target.
    OSError
        The disk refuses.
    """
    path = hidden_path(target, end)
    descriptor = _make(path, folder=folder)
    try:
        yield path
    finally:
        remove(path)
        if descriptor is not None:
            os.close(descriptor)


def _make(path: Path, *, folder: bool) -> int | None:
    """Make a file or folder and lock it; the descriptor of the lock."""
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
            continue  # another run's; or one that tidies was quicker, and removes it
        if descriptor is None and os.path.lexists(path):
            return None
        if descriptor is not None:
            if _is_at(path, descriptor):
                return descriptor
            os.close(descriptor)
    raise OptionError("another run is writing there at this moment", fix="wait for its end, or choose another target")


def tidy(target: Path) -> None:
    """Remove what runs that were killed left beside a target; put back what one moved aside and did not replace."""
    for path in _places(target):
        tidy_folder(path.parent, {path.name}.__contains__)


def tidy_folder(folder: Path, is_target: Callable[[str], object]) -> None:
    """`tidy` every target in a folder whose name is wanted."""
    for path, target, pid, end in _leftovers(folder, is_target):
        with claim(path, pid) as abandoned:
            if not abandoned:
                continue
            if end == "pair":
                put_back(path, target)
            elif end == "old" and not os.path.lexists(target):
                path.rename(target)
            else:
                remove(path)


def is_moved_aside(target: Path) -> bool:
    """Whether a killed run left a target under its hidden name, so that `tidy` will put it back."""
    leftovers = [leftover for path in _places(target) for leftover in _leftovers(path.parent, {path.name}.__contains__)]
    return not target.exists() and any(end in ("old", "pair") for *_, end in leftovers)


def _places(target: Path) -> set[Path]:
    """A target, and what it is a link to: a folder is replaced where it really is."""
    return {path for path in (target, Path(os.path.realpath(target))) if path.name}


def _leftovers(folder: Path, is_target: Callable[[str], object]) -> list[tuple[Path, Path, int, str]]:
    """Hidden names in a folder: the path, the target beside it, the number of the process, and the end."""
    try:
        inside = sorted(path.name for path in folder.iterdir())
    except OSError:
        return []  # whoever writes there will say what is wrong
    matches = [match for name in inside if name.startswith(".") and (match := _HIDDEN.fullmatch(name))]
    return [
        (folder / match[0], folder / match["name"], int(match["pid"]), match["end"])
        for match in matches
        if is_target(match["name"])
    ]


@contextmanager
def claim(path: Path, pid: int) -> Iterator[bool]:
    """Whether nobody works on a hidden path any more; during the block nobody begins to."""
    try:
        descriptor = lock(path)
    except BlockingIOError:
        yield False
        return
    if descriptor is None:
        yield os.path.lexists(path) and not _is_alive(pid)
        return
    try:
        yield _is_at(path, descriptor)
    finally:
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a path still names what was opened: it may have been removed, and made anew, before it was locked."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _is_alive(pid: int) -> bool:
    """Whether a process of this number runs: what it writes is not ours to remove."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def put_back(pair: Path, weights: Path) -> None:
    """Give weights that were moved aside and not replaced their place again, after what stood beside them."""
    if os.path.lexists(pair / weights.name) and not os.path.lexists(weights):
        for name in COMPANIONS:
            if os.path.lexists(pair / name):
                (pair / name).replace(weights.with_name(name))
            elif os.path.lexists(pair / f"{name}{NONE}"):
                weights.with_name(name).unlink(missing_ok=True)
        (pair / weights.name).rename(weights)
    remove(pair)


def remove(path: Path) -> None:
    """Remove a file, or a folder with everything in it, as far as the system lets us."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
