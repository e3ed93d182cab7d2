"""Updating an index: what is new or changed is measured, what is gone is forgotten, and the rest is left alone."""

import errno
import os
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from stat import S_ISDIR
from typing import Literal, final

from loralens.core.messages import progress
from loralens.core.threads import processor_count, single_blas_thread
from loralens.errors import FormatError, OptionError
from loralens.fleet.catalogue import UNREACHABLE, FileRow, FleetState, is_whole_disk, read_state, reading_setting
from loralens.fleet.catalogue_writer import CatalogueWriter
from loralens.fleet.executors import make_chunks, measure_in_processes, measure_on_executor, worker_count
from loralens.fleet.known_bases import infer_bases
from loralens.fleet.measuring import MeasuredFile
from loralens.formats.files.container import CONFIG
from loralens.formats.records.collection import candidate_paths, note_repeated_links
from loralens.tables.numbers import count

# Threads of one process wait for each other wherever Python itself computes: two processes take little more than half
# of the time of two threads, after a second to start.
MANY = 400  # files from which on the command line starts processes


# Which files there are, and how they are told from those that were indexed

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@final
@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file that may be an adapter, a folder that has a configuration without weights, or what cannot be reached.

    Attributes
    ----------
    path : str
        Relative to the root.
    size : int
        Bytes.
    stamp : str
        Changes if the file or the configuration beside it does: their sizes and times.
    real : str
        The device and inode: equal for two paths to one file.
    reason : str
        Why a folder cannot be listed, or a file not be reached; empty for everything else.
    """

    path: str
    size: int
    stamp: str
    real: str
    reason: str = ""


def scan(
    root: Path, *, without: Path | None = None, linked: Callable[[Path], object] | None = None
) -> dict[str, FoundFile]:
    """The files under ``root`` by their paths relative to it; what lies under ``without`` is left out.

    ``linked`` receives every link to a folder.

    A folder that cannot be listed is among them, with the reason. What it holds is unknown, which is another thing than
    that it holds nothing.

    Raises
    ------
    FormatError
        ``root`` itself cannot be listed.
    """
    prefix = len(os.path.join(root, "x")) - 1  # noqa: PTH118
    outside = f"{without}{os.sep}" if without else None
    unlisted: dict[Path, OSError] = {}
    files = {}
    for text in candidate_paths(root, failed=unlisted.setdefault, linked=linked):
        if outside and text.startswith(outside):
            continue
        name = text[prefix:] if text != str(root) else "."
        try:
            status = os.stat(text)  # noqa: PTH116  # half the time of a Path, for thousands of files
        except OSError as error:
            # A link that leads nowhere; one of a cache whose download was interrupted, for example.
            if error.errno in _ABSENT:
                continue
            files[name] = _unreachable(name, f"cannot be reached: {error.strerror}")
            continue
        size = 0 if S_ISDIR(status.st_mode) else status.st_size
        files[name] = FoundFile(name, size, _stamp(text, status), f"{status.st_dev:x}:{status.st_ino:x}")
    for folder, refused in unlisted.items():
        if folder == root:
            fix = "give yourself the right to read it, or mount its disk"
            raise FormatError(f"{root}: cannot be listed: {refused.strerror}", fix=fix) from refused
        # What was removed meanwhile is gone.
        if refused.errno not in _ABSENT:
            name = str(folder.relative_to(root))
            files[name] = _unreachable(name, f"this folder cannot be listed: {refused.strerror}")
    return files


def _unreachable(name: str, reason: str) -> FoundFile:
    return FoundFile(name, 0, UNREACHABLE, "", reason)


def look_through(
    root: Path, home: Path, known: Collection[str], linked: Callable[[Path], object] | None = None
) -> tuple[dict[str, FoundFile], set[str]]:
    """The files under a folder, and those of the known paths that may still be there although they were not found.

    These lie below a folder that cannot be listed, which is among the files with the reason. ``linked`` receives every
    link to a folder.
    """
    files = scan(root, without=home, linked=linked)
    unreachable = {path for path, file in files.items() if file.reason}
    missing = (path for path in known if path not in files)
    return files, {path for path in missing if not unreachable.isdisjoint(map(str, PurePath(path).parents))}


def count_changes(state: FleetState, home: Path) -> dict[str, int]:
    """How many files are ``new``, ``changed`` and ``gone``, compared with an index; zeros are left out."""
    root = state.root
    if not os.path.isdir(root):  # noqa: PTH112  # a Path raises an error for a text that no path can be
        return {"gone": len(state.files)} if state.files else {}
    found = look_through(Path(os.path.realpath(root)), Path(os.path.realpath(home)), state.files)
    counts = Counter(change.change for change in _changes(*found, state.files))
    return {kind: counts[kind] for kind in ("new", "changed", "gone") if counts[kind]}


def _changes(
    files: Mapping[str, FoundFile], hidden: Collection[str], known: Mapping[str, FileRow], *, again: bool = False
) -> list["FileChange"]:
    """What is new, changed and gone of what `look_through` has found; with ``again`` every known file has changed.

    What was found out about adapters that cannot be reached now stays.
    """
    changes = [
        FileChange(path, "changed" if path in known else "new")
        for path, file in files.items()
        if path not in known
        or ((again or known[path].stamp != file.stamp) and not (file.reason and known[path].status == "adapter"))
    ]
    return [*changes, *(FileChange(path, "gone") for path in sorted(known.keys() - files.keys() - {*hidden}))]


def stamp_of(path: Path) -> str:
    """The stamp of a file now; empty if it is gone."""
    try:
        return _stamp(str(path), path.stat())
    except OSError:
        return ""


def real_of(path: Path) -> str:
    """The device and inode of a file, as in `FoundFile`; empty if there is none."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_dev:x}:{status.st_ino:x}"


def _stamp(path: str, status: os.stat_result) -> str:
    is_folder = S_ISDIR(status.st_mode)
    config = os.path.join(path if is_folder else os.path.dirname(path), CONFIG)  # noqa: PTH118, PTH120
    # The time of a folder changes with every file in it.
    own = "" if is_folder else _size_and_time(status)
    try:
        return f"{own} {_size_and_time(os.stat(config))}"  # noqa: PTH116
    except OSError:
        return own


def _size_and_time(status: os.stat_result) -> str:
    return f"{status.st_size}:{status.st_mtime_ns}"


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Path → the name that people see: the folder of an adapter, if it holds no other one."""
    listed = list(paths)
    folders = {path: os.path.dirname(path) for path in listed}  # noqa: PTH120
    count = Counter(folders.values())
    return {path: folder if folder and count[folder] == 1 else path for path, folder in folders.items()}


# Updating


@final
@dataclass(frozen=True, slots=True)
class FileChange:
    """A file that is new, changed or gone since the last update; ``path`` is relative to the root."""

    path: str
    change: Literal["new", "changed", "gone"]


def update_index(
    home: Path,
    root: Path | None,
    executor: Executor | None,
    *,
    jobs: int | None = None,
    once: bool = False,
    spawning: bool = False,
) -> tuple[FleetState, list[FileChange], list[str], bool]:
    """Make or update the index at ``home``; see `loralens.Fleet.update`.

    With ``spawning``, many files are measured in processes without being asked for, as by the command line. A script
    must not do that: every process would run the script again.

    Returns
    -------
    state : FleetState
        That of the index afterwards.
    changes : list of FileChange
    unreachable : list of str
        The paths of adapters that cannot be reached now, and are kept as they were.
    first : bool
        Whether there was no index before.
    """
    # The folder is checked before anything is made.
    # os.path, since a Path raises an error for a text that is longer than a name may be.
    if root is not None and (not os.path.isdir(root) or is_whole_disk(root)):  # noqa: PTH112
        what = "is the whole disk" if is_whole_disk(root) else "is not a folder"
        raise OptionError(f"{root}: {what}", fix="give the folder of the adapters")
    writer = CatalogueWriter(home)
    try:
        changes = _update(writer, root, executor, jobs=jobs, once=once, spawning=spawning)
    except BaseException:
        # What was measured is kept after an error and after Ctrl-C, and the same call goes on from there.
        with suppress(FormatError):
            writer.close()
        raise
    writer.close()
    return read_state(home), *changes, writer.before is None


def _update(
    writer: CatalogueWriter,
    root: Path | None,
    executor: Executor | None,
    *,
    jobs: int | None,
    once: bool,
    spawning: bool,
) -> tuple[list[FileChange], list[str]]:
    folder = _chosen_root(writer, root)
    reading = reading_setting(once=once)
    indexed = writer.before.files if writer.before else {}
    adapters = {path for path, row in indexed.items() if row.status == "adapter"}
    links: list[Path] = []
    files, hidden = look_through(folder, Path(os.path.realpath(writer.home)), indexed.keys(), links.append)
    # Messages show the folder as the user wrote it, which is shorter than its real path.
    shown = folder if root is None else root
    # More likely a disk is not mounted, or a folder was moved, than that every adapter is gone.
    if adapters and not files:
        raise OptionError(
            f"{shown}: is empty, and the index has {count(len(adapters), 'adapter')} of this folder",
            fix=f"mount its disk, or put them back; if they are gone for good, remove {writer.home}",
        )
    kept = {path for path in adapters if path in hidden or (path in files and files[path].reason)}
    # Files that were read in another way are read again.
    again = writer.before is not None and writer.before.reading != reading
    changes = _changes(files, hidden, indexed, again=again)
    todo = [files[change.path] for change in changes if change.change != "gone"]
    if spawning and executor is None and jobs is None and len(todo) >= MANY and processor_count() > 1:
        jobs = processor_count()
    writer.begin(folder, reading)
    if links:
        note_repeated_links(
            shown, [shown / path for path in files], [shown / link.relative_to(folder) for link in links]
        )
    writer.remove(change.path for change in changes if change.change == "gone")
    found = _measure(str(folder), todo, executor, jobs, once=once, wary=writer.was_killed)
    with progress("indexing", len(todo)) as step, closing(found):
        for measured in found:
            _store(writer, measured, files)
            if step:
                step(len(measured))
    # Files may have been moved or copied together with the index.
    writer.identify(
        {
            path: files[path].real
            for path in indexed.keys() & files.keys()
            if files[path].real not in ("", indexed[path].real)
        }
    )
    names = writer.names()
    writer.rename({path: name for path, name in short_names(names).items() if names[path] != name})
    writer.infer(infer_bases(*writer.bases()))
    return changes, sorted(kept)


def _chosen_root(writer: CatalogueWriter, root: Path | None) -> Path:
    """The real path of the folder of the adapters."""
    stored = writer.before.root if writer.before else None
    if root is None:
        if stored is None:
            raise OptionError(f"{writer.home}: the index is new", fix="say which folder it is of: update(DIR)")
        return Path(os.path.realpath(stored))
    real = Path(os.path.realpath(root))
    # A collection may have been moved. But two folders under one index would drive each other out at every update.
    if stored is not None and os.path.isdir(stored) and Path(os.path.realpath(stored)) != real:  # noqa: PTH112
        fix = f"choose another place for the index (-o), or remove {writer.home}"
        raise OptionError(f"{writer.home}: is the index of {stored}, not of {real}", fix=fix)
    return real


def _measure(
    root: str, todo: Sequence[FoundFile], executor: Executor | None, jobs: int | None, *, once: bool, wary: bool
) -> Generator[list[MeasuredFile], None, None]:
    """Measure files where the caller wants; ``wary`` in processes, since a file may have killed the run before."""
    fix = "mount its disk, or give yourself the right to read it, and index again; adapters in it are kept"
    yield [MeasuredFile(file.path, "unreadable", file.reason, fix) for file in todo if file.reason]
    workers = jobs or (executor and worker_count(executor)) or processor_count()
    chunks = make_chunks([(file.path, file.size) for file in todo if not file.reason], workers)
    # Dask finds such files itself.
    if wary and (executor is None or worker_count(executor)):
        executor, jobs = None, workers
    if not chunks:
        return
    if executor is None and jobs is not None:
        yield from measure_in_processes(jobs, root, chunks, once=once)
        return
    with ExitStack() as stack:
        if executor is None:
            stack.enter_context(single_blas_thread())
            executor = ThreadPoolExecutor(workers)
            stack.callback(executor.shutdown, cancel_futures=True)
        done: set[str] = set()
        try:
            for measured in measure_on_executor(executor, root, chunks, once=once):
                yield measured
                done |= {each.path for each in measured}
        except BrokenExecutor:
            # A process of the executor was killed, perhaps by a file, and the executor takes no more work.
            rest = [[path for path in chunk if path not in done] for chunk in chunks]
            yield from measure_in_processes(workers, root, list(filter(None, rest)), once=once)


def _store(writer: CatalogueWriter, measured: Sequence[MeasuredFile], files: Mapping[str, FoundFile]) -> None:
    rows = []
    for each in measured:
        file = files[each.path]
        stated = {"bytes": file.size, "stamp": file.stamp, "real": file.real, "path": file.path}
        rows.append({**each.columns, **stated, "status": each.status, "reason": each.reason, "fix": each.fix})
    writer.store(rows, {each.columns["signature"]: each.modules for each in measured if each.columns})
