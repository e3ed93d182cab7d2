"""Writing files and folders that appear complete or not at all, whatever interrupts the process.

What is unfinished stands beside its target ``NAME`` under a hidden name:

==============  =====================================================================================================
``.NAME.part``  the new content, which takes the name of the target once it is complete and on the disk
``.NAME.old``   the old folder, between the two renames that replace it
``.NAME.pair``  a folder with old weights and the files that belong to them, while new ones take their places
==============  =====================================================================================================

The process that writes holds a lock on it, which the system releases however the process ends. So another run is
refused meanwhile, and a later one can tell what a killed run has left: it removes it, and restores what was moved aside
and not yet replaced.
"""

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from stat import S_IMODE, S_ISDIR, S_ISREG
from time import sleep
from typing import BinaryIO

from loralens.errors import FormatError, OptionError, place, target_exists
from loralens.formats.files.container import CONFIG, RECORD
from loralens.formats.files.disk import check_room, disk_errors, flush, lock, lock_or_refuse, sync, sync_folder

Input = tuple[str, Path]  # what it is in words, such as "the base", and its path
# Opens a stream for the file that will be at a path: `atomic_file` for a single file, `replaced_together` for several.
Put = Callable[[Path], AbstractContextManager[BinaryIO]]

COMPANIONS = (CONFIG, f"{RECORD}.json")  # the files that may lie beside weights and belong to them
_NONE = ".none"  # NAME.none in a .pair says that there was no file NAME
_ENDS = ("part", "old", "pair")
_HIDDEN = re.compile(rf"\.(.+)\.(?:{'|'.join(_ENDS)})", re.DOTALL)  # a name may contain anything, also a line end
_ATTEMPTS, _PAUSE = 50, 0.01  # to take a lock, and the seconds between two of them
_INPUT_FIX = "choose a target outside the inputs: what is read is never written to"
MEANWHILE = "another run has written there meanwhile"


def check_apart(target: Path, inputs: Iterable[Input], *, within: bool = True) -> None:
    """Refuse a target that is an input, contains one, or (with ``within``) lies inside one.

    Links are followed on both sides.
    """
    target_path = Path(os.path.realpath(target))
    with place(target):
        for what, path in inputs:
            # The input may be a link itself. Then both matter: the link, which must not be replaced, and its other end.
            for input_path in {Path(os.path.realpath(path)), Path(os.path.realpath(path.parent)) / path.name}:
                if _is_same_place(target_path, input_path):
                    raise OptionError(f"is {what} itself", fix=_INPUT_FIX)
                if any(_is_same_place(target_path, folder) for folder in input_path.parents):
                    raise OptionError(f"holds {what}", fix=_INPUT_FIX)
                if within and any(_is_same_place(folder, input_path) for folder in target_path.parents):
                    raise OptionError(f"lies within {what}", fix=_INPUT_FIX)


def _is_same_place(first: Path, second: Path) -> bool:
    """Whether two paths are the same place, also where case is ignored, or a folder is mounted twice."""
    try:
        # Two hard links are one file with two names. Replacing one name does not change the other, so a file is the
        # same place only if its folder is the same too.
        same = first.samefile(second) and (first.is_dir() or first.parent.samefile(second.parent))
    except OSError:
        same = False
    return same or first == second


def check_write_target(target: Path, inputs: Collection[Input], *, folder: bool, overwrite: bool) -> None:
    """Refuse a target that exists or cannot be replaced, or that overlaps with an input."""
    check_apart(target, inputs)
    if target.exists() and not overwrite:
        raise target_exists()
    if target.exists() and target.is_dir() != folder:
        what = next(iter(inputs))[0]
        kinds = "a folder, but {} is a file" if target.is_dir() else "a file, but {} is a folder"
        raise OptionError(f"is {kinds.format(what)}", fix="give a folder for a folder, a file for a file")
    # Otherwise the error would appear only at the final rename, possibly after hours of work.
    if target.is_dir() and (why := _why_immovable(Path(os.path.realpath(target)))):
        raise OptionError(f"cannot be replaced: {why}", fix="choose another target")
    check_room(target)


def _why_immovable(folder: Path) -> str | None:
    """The reason why a folder cannot be renamed, as far as it can be known beforehand; None if there is none."""
    with suppress(OSError):  # the working directory may have been removed
        working_folder = Path.cwd().resolve()
        # A process whose working directory is the folder would stay in the old one, which is removed.
        if folder == working_folder or folder in working_folder.parents:
            return "the current directory is in it"
    if os.path.ismount(folder):
        return "a disk is mounted there"
    return None if os.access(folder.parent, os.W_OK | os.X_OK) else "the folder it is in may not be written to"


def check_space(target: Path, needed: int) -> None:
    """Refuse to begin a long run whose result the disk has no room for. A quota of the user is not seen here."""
    free = shutil.disk_usage(target.absolute().parent).free
    if free < needed:
        what = f"cannot be written: it takes {needed:,} bytes, but the disk has {free:,} left"
        # `at`, since most callers name the target themselves, and a place that two callers add is named once.
        raise FormatError(what, fix="free some space, or choose another place").at(str(target))


# ---- Hidden names and their locks


def _hidden(target: Path, end: str) -> Path:
    return target.with_name(f".{target.name}.{end}")


@contextmanager
def reserve(target: Path, *, folder: bool = False, end: str = "part", wait: bool = False) -> Iterator[Path]:
    """Make a hidden file or folder beside ``target``, which is removed after the block unless it was renamed.

    Folders on the way to the target are made, and stay even if the block fails. With ``wait``, another run that writes
    to the same target is waited for, instead of an OptionError.
    """
    path = _hidden(target, end)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _make(path, folder=folder, wait=wait)
    # Nobody reads what is written while it is not complete, who could not read what it replaces.
    keep_mode(target, path, also=0o700 if folder else 0o600)
    try:
        yield path
    finally:
        remove(path)
        if descriptor is not None:
            os.close(descriptor)


def _make(path: Path, *, folder: bool, wait: bool) -> int | None:
    """Make a file or folder and lock it; returns the descriptor of the lock, or None on a disk without locks."""
    attempt = 0
    while True:
        new = True
        try:
            if folder:
                path.mkdir()
            else:
                path.touch(exist_ok=False)
        except FileExistsError:
            new = False
        try:
            descriptor = lock_or_refuse(path, wait=wait)
        except OptionError:
            # A run that tidies up may hold the lock for a moment.
            attempt += 1
            if attempt == _ATTEMPTS:
                raise
            sleep(_PAUSE)
            continue
        if descriptor is None and os.path.lexists(path):
            if new:
                return None
            what = "another run is writing there at this moment, or one was killed"
            raise OptionError(what, fix=f"wait for its end; if no run is writing there, remove {path}")
        if descriptor is not None:
            if _is_at(path, descriptor):
                if new:
                    return descriptor
                remove(path)  # what a killed run left is not written into: it may be a link
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a path still names the opened file, which may have been removed or renamed before it was locked."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def keep_mode(old: Path, new: Path, *, also: int = 0) -> None:
    """Give a new file or folder the permissions of the one that it replaces, if there is one; ``also`` are added."""
    with suppress(OSError):  # nothing is replaced, or the disk has no permissions
        mode = old.stat().st_mode
        # Everybody may write to a device, and may have written to a pipe.
        if S_ISREG(mode) or S_ISDIR(mode):
            new.chmod(S_IMODE(mode) | also)


def remove(path: Path) -> None:
    """Remove a file, or a folder with everything in it, as far as the system allows."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _places(target: Path) -> set[Path]:
    """A target and the path that it links to: if a folder is a link, the folder to which it links is replaced."""
    return {path for path in (target, Path(os.path.realpath(target))) if path.name}


@contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Tell whether a hidden path is there and abandoned; no other process can take it during the block."""
    try:
        descriptor = lock(path)
    except BlockingIOError:
        descriptor = None
    if descriptor is None:
        yield False
        return
    try:
        yield _is_at(path, descriptor)
    finally:
        os.close(descriptor)


def tidy(target: Path) -> None:
    """Remove what killed runs left beside a target, and restore what they moved aside and did not replace."""
    for path in _places(target):
        for end in _ENDS:
            hidden = _hidden(path, end)
            with _claim(hidden) as abandoned:
                if abandoned and end == "old" and not os.path.lexists(path):
                    hidden.rename(path)
                elif abandoned:
                    _restore(hidden, path)


def tidy_folder(folder: Path, is_target: Callable[[str], object]) -> None:
    """`tidy` every target in a folder whose name ``is_target`` accepts."""
    names: list[str] = []
    with suppress(OSError):  # the caller meets the same error when it writes there, and reports it
        names = sorted(path.name for path in folder.iterdir())
    for match in map(_HIDDEN.fullmatch, names):
        if match and is_target(match[1]):
            tidy(folder / match[1])


def is_moved_aside(target: Path) -> bool:
    """Whether a killed run left a target under a hidden name, from which `tidy` will restore it."""
    hidden = (_hidden(path, end) for path in _places(target) for end in ("old", "pair"))
    return not target.exists() and any(map(os.path.lexists, hidden))


def was_killed(target: Path) -> bool:
    """Whether a run that wrote a target was killed, and no later run to the same target has tidied up."""
    for path in _places(target):
        with _claim(_hidden(path, "part")) as abandoned:
            if abandoned:
                return True
    return False


# ---- Writing


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Give a stream whose file takes the place of ``path`` when the block succeeds and is removed otherwise.

    An OSError of the block becomes a FormatError that names ``path``; other errors pass unchanged.
    """
    with replaced_together(path) as put, put(path) as stream:
        yield stream


@contextmanager
def replaced_together(weights: Path, *, absent: Sequence[Path] = ()) -> Iterator[Put]:
    """Give a function that opens files; when the block succeeds, all of them take their places, the weights last.

    The scale of an adapter may be in another file than its factors. New factors with an old configuration would be
    another update, and would load without an error. So there are no weights while the files are replaced. Files at
    ``absent`` are removed, as they would be taken for the configuration of the new weights.
    """
    parts: dict[Path, Path] = {}
    with ExitStack() as stack:

        @contextmanager
        def put(path: Path) -> Iterator[BinaryIO]:
            with place(path), disk_errors():
                tidy(path)
                part = stack.enter_context(reserve(path))
                with part.open("wb") as stream:
                    yield stream
                    flush(stream)
            parts[path] = part

        yield put
        with place(weights), disk_errors():
            others = [*(path for path in parts if path != weights), *absent]
            for path, part in parts.items():
                keep_mode(path, part)
            # Weights alone are replaced by one rename, which needs no preparation.
            if others and os.path.lexists(weights):
                _make_way(weights, others, stack)
            for path in (*(path for path in others if path in parts), weights):
                parts[path].replace(path)
            sync_folder(weights.parent)


def _make_way(weights: Path, others: Sequence[Path], stack: ExitStack) -> None:
    """Move weights and other files into a ``.pair``; at the end of the stack they are put back, or removed."""
    pair = stack.enter_context(reserve(weights, folder=True, end="pair"))
    stack.callback(_restore, pair, weights)
    for path in others:
        if not os.path.lexists(path):
            (pair / f"{path.name}{_NONE}").touch()
    # The weights go first and come back last, so that none is loaded with a wrong configuration.
    for path in (weights, *others):
        if os.path.lexists(path):
            path.rename(pair / path.name)


def _restore(hidden: Path, target: Path) -> None:
    """Put back what is in a ``.pair`` if its weights were not replaced, and remove it."""
    if os.path.lexists(hidden / target.name) and not os.path.lexists(target):
        for old in sorted(hidden.iterdir(), key=lambda old: old.name == target.name):
            if old.name.endswith(_NONE):
                target.with_name(old.name.removesuffix(_NONE)).unlink(missing_ok=True)
            else:
                old.rename(target.with_name(old.name))
    remove(hidden)


@contextmanager
def atomic_path(target: Path, *, folder: bool, overwrite: bool) -> Iterator[Path]:
    """Give a path to write to, which takes the place of ``target`` when the block succeeds and is removed otherwise.

    A link to a folder is followed: its other end is replaced.
    """
    with place(target):
        target = Path(os.path.realpath(target)) if folder and target.is_symlink() else target.absolute()
        with disk_errors(), reserve(target, folder=folder) as part:
            if os.path.lexists(target) and not overwrite:
                raise OptionError(MEANWHILE, fix="choose another target, or give --overwrite")
            yield part
            sync(part)
            if overwrite:
                for new in (part, *part.rglob("*")):
                    keep_mode(target / new.relative_to(part), new)
            # A file is replaced at once. A folder that is not empty cannot be, so it has to make way.
            with move_aside(target) if overwrite and folder else nullcontext():
                if folder and os.path.lexists(target):
                    raise OptionError(MEANWHILE, fix="choose another target, or give --overwrite")
                part.replace(target)
                sync_folder(target.parent)


@contextmanager
def move_aside(target: Path) -> Iterator[None]:
    """Move ``target``, if it is there, aside for the block; then remove it, or move it back if nothing took its place.

    If this run is killed, the next one moves it back.
    """
    # exists() would follow a link to nothing, which has to be moved aside too.
    if not os.path.lexists(target):
        yield
        return
    descriptor = lock_or_refuse(target)  # without it, another run would mistake it for the rest of a killed run
    old = _hidden(target, "old")
    try:
        target.rename(old)
        yield
    finally:
        # Something has taken the place, so the old one is no longer needed.
        if os.path.lexists(target):
            remove(old)
        elif os.path.lexists(old):
            old.rename(target)
        if descriptor is not None:
            os.close(descriptor)
