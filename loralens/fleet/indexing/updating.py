"""Updating an index: what is new or changed is measured, what is gone is forgotten, and the rest is left alone."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import final

from loralens.core.messages import Step, progress, warn
from loralens.core.threads import processor_count, single_blas_thread
from loralens.errors import FormatError, OptionError
from loralens.fleet.bases.inference import infer_bases
from loralens.fleet.catalogue.dates import keep_dates
from loralens.fleet.catalogue.reading import check_catalogue, is_whole_disk, read_summary
from loralens.fleet.catalogue.schema import (
    CATALOGUE,
    FOLDER,
    SKETCHES,
    check_files,
    finish_killed_write,
    reading_setting,
)
from loralens.fleet.catalogue.writing import CatalogueWriter, remove_index
from loralens.fleet.indexing.engine import Engine, broken_executor, make_chunks
from loralens.fleet.indexing.measuring import MeasuredFile
from loralens.fleet.indexing.scanning import FoundFile, look_through, short_names
from loralens.fleet.indexing.update_result import FileChange, UpdateResult
from loralens.formats.files.disk import Hold
from loralens.formats.records.collection import note_repeated_links
from loralens.tables.numbers import count

# Each commit waits for the disk several times. A run that is killed loses what was not committed.
COMMIT_SECONDS = 1.0  # seconds between commits
COMMIT_FILES = 512  # or this many files
# Threads of one process wait for each other wherever Python itself computes: two processes take little more than half
# of the time of two threads, after a second to start.
MANY = 400  # files from which on the command line starts processes
UNREACHABLE_FIX = "mount its disk, or give yourself the right to read it, and index again; adapters in it are kept"


def update_index(
    home: Path,
    root: Path | None,
    executor: Executor | None,
    *,
    jobs: int | None = None,
    once: bool = False,
    spawning: bool = False,
) -> UpdateResult:
    """Make or update the index at ``home``; see `loralens.Fleet.update`.

    With ``spawning``, many files are measured in processes without being asked for, as by the command line. A script
    must not do that: every process would run the script again.
    """
    # The folder is checked before anything is made.
    # os.path, since a Path raises an error for a text that is longer than a name may be.
    if root is not None and (not os.path.isdir(root) or is_whole_disk(root)):  # noqa: PTH112
        what = "is the whole disk" if is_whole_disk(root) else "is not a folder"
        raise OptionError(f"{root}: {what}", fix="give the folder of the adapters")
    existed = _is_readable(home)
    with closing(CatalogueWriter(home)) as writer:
        folder = _chosen_root(writer, root)
        reading = reading_setting(once=once)
        plan = _plan_update(writer, folder, reading)
        # Messages show the folder as the user wrote it, which is shorter than its real path.
        shown = folder if root is None else root
        if spawning and executor is None and jobs is None and len(plan.todo) >= MANY and processor_count() > 1:
            jobs = processor_count()
        _check_not_emptied(shown, home, plan.files, writer.expected())
        writer.begin(folder, {"reading": reading})
        if plan.links:
            links = [shown / link.relative_to(folder) for link in plan.links]
            note_repeated_links(shown, [shown / path for path in plan.files], links)
        writer.remove(plan.gone)
        engine = Engine(str(folder), once, writer.set_in_work)
        _Update(writer, engine, plan.files).run(plan.todo, executor, jobs)
        writer.mark_unreachable(plan.kept)
        writer.identify(plan.moved)
        writer.rename(short_names(writer.shown_paths()))
        writer.forget_signatures()
        signatures, named = writer.bases()
        writer.infer(infer_bases(signatures, named))
        writer.complete()
    summary = read_summary(home)
    return UpdateResult(
        home,
        summary.root,
        summary.adapters,
        summary.others,
        plan.changes(),
        summary.unreadable,
        [summary.root / path for path in sorted(plan.kept)],
        first=not existed,
    )


@final
@dataclass(frozen=True, slots=True)
class _Plan:
    """What an update has to do.

    Attributes
    ----------
    files : mapping of str to FoundFile
        All files that were found.
    indexed : collection of str
        The paths that the index has before.
    todo : sequence of FoundFile
        Files that are new or have changed.
    gone : sequence of str
    kept : set of str
        Adapters that cannot be reached now. What was found out about them stays.
    moved : mapping of str to str
        Path → identity of files that were moved or copied together with the index.
    links : sequence of Path
        Links to folders.
    """

    files: Mapping[str, FoundFile]
    indexed: Collection[str]
    todo: Sequence[FoundFile]
    gone: Sequence[str]
    kept: set[str]
    moved: Mapping[str, str]
    links: Sequence[Path]

    def changes(self) -> list[FileChange]:
        """What the update has changed."""
        return [
            *(FileChange(file.path, "changed" if file.path in self.indexed else "new") for file in self.todo),
            *(FileChange(path, "gone") for path in self.gone),
        ]


def _plan_update(writer: CatalogueWriter, folder: Path, reading: str) -> _Plan:
    """Compare the files under a folder with those of the index."""
    indexed = writer.indexed_files()
    links: list[Path] = []
    files, hidden = look_through(folder, Path(os.path.realpath(writer.home)), indexed.keys(), links.append)
    kept = {path for path in writer.adapters() if path in hidden or (path in files and files[path].reason)}
    # Files that were read in another way are read again.
    same_way = writer.setting("reading") == reading
    stamps = {path: stamp for path, (stamp, _) in indexed.items()} if same_way else {}
    return _Plan(
        files,
        indexed,
        [file for file in files.values() if file.path not in kept and stamps.get(file.path) != file.stamp],
        sorted(indexed.keys() - files.keys() - hidden),
        kept,
        {
            path: file.real
            for path, file in files.items()
            if path in indexed and not file.reason and indexed[path][1] != file.real
        },
        links,
    )


def _check_not_emptied(root: Path, home: Path, files: Mapping[str, FoundFile], expected: Collection[str]) -> None:
    """Refuse to forget every adapter: more likely a disk is not mounted, or a folder was moved."""
    if expected and not files:
        raise OptionError(
            f"{root}: is empty, and the index has {count(len(expected), 'adapter')} of this folder",
            fix=f"mount its disk, or put them back; if they are gone for good, remove {home}",
        )


def _is_readable(home: Path) -> bool:
    """Whether there is an index that this version can go on with; one that it cannot read is removed."""
    check_files(home)
    if not (home / CATALOGUE).exists():
        return False
    try:
        finish_killed_write(home)
        check_catalogue(home)
    except OptionError as error:
        if "version" not in error.what:
            raise
        reason = error.what
    except FormatError as error:
        reason = error.what
    else:
        return True
    # An index has both files. Without the second one this may be a database of another program. A process that was
    # killed at its beginning leaves an empty one.
    lone = home.name != FOLDER and not (home / SKETCHES).exists()
    if lone and (home / CATALOGUE).stat().st_size:
        what = f"{home / CATALOGUE}: is not an index of loralens that could be made anew"
        raise OptionError(what, fix="choose another place for the index (-o), or remove this file")
    # The index is not removed while another process may write it.
    hold = Hold()
    hold.take(home)
    try:
        dates = "is kept" if keep_dates(home) else "is lost"
        warn(f"{reason}; it is made anew, and when each file was first indexed {dates}")
        remove_index(home)
    finally:
        hold.release()
    return False


def _chosen_root(writer: CatalogueWriter, root: Path | None) -> Path:
    """The real path of the folder of the adapters."""
    stored = writer.root()
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


@final
class _Update:
    """Measures files and stores what is found out about them."""

    def __init__(self, writer: CatalogueWriter, engine: Engine, files: Mapping[str, FoundFile]) -> None:
        self._writer, self._engine, self._files = writer, engine, files
        self._waiting: list[MeasuredFile] = []
        self._committed = monotonic()

    def run(self, todo: Sequence[FoundFile], executor: Executor | None, jobs: int | None) -> None:
        """Measure these files."""
        with progress("indexing", len(todo)) as step:
            try:
                unreachable = [file for file in todo if file.reason]
                self._take(
                    [MeasuredFile(file.path, "unreadable", file.reason, UNREACHABLE_FIX) for file in unreachable], step
                )
                for measured in self._measure([file for file in todo if not file.reason], executor, jobs):
                    self._take(measured, step)
            except BrokenExecutor as error:
                raise broken_executor(error) from error
            except BaseException:
                # An error or Ctrl-C ends this update. The process was not killed, so no file is noted as suspect.
                self._writer.finish()
                raise
            finally:
                # What was measured is kept after Ctrl-C too, and the same call goes on from there.
                self._commit()

    def _measure(
        self, todo: Sequence[FoundFile], executor: Executor | None, jobs: int | None
    ) -> Iterator[list[MeasuredFile]]:
        """Measure files that may have killed an earlier run in processes, and the others where the caller wants."""
        before = self._writer.suspects()
        workers = jobs or getattr(executor, "_max_workers", None) or processor_count()
        suspects = make_chunks([(file.path, file.size) for file in todo if file.path in before], workers)
        chunks = make_chunks([(file.path, file.size) for file in todo if file.path not in before], workers)
        if suspects:
            yield from self._engine.in_processes(workers, suspects)
        if not chunks:
            return
        with ExitStack() as stack:
            if executor is not None:
                yield from self._engine.on_executor(executor, chunks)
            elif jobs is not None:
                yield from self._engine.in_processes(jobs, chunks)
            else:
                stack.enter_context(single_blas_thread())
                pool = ThreadPoolExecutor(workers)
                stack.callback(pool.shutdown, cancel_futures=True)
                yield from self._engine.on_executor(pool, chunks)

    def _take(self, measured: Sequence[MeasuredFile], step: Step | None) -> None:
        self._waiting += measured
        if step:
            step(len(measured))
        if len(self._waiting) >= COMMIT_FILES or monotonic() - self._committed >= COMMIT_SECONDS:
            self._commit()

    def _commit(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            rows = [self._row(each) for each in waiting]
            signatures = {each.columns["signature"]: each.modules for each in waiting if each.columns}
            self._writer.store(rows, [each.slot for each in waiting], signatures)
        self._committed = monotonic()

    def _row(self, measured: MeasuredFile) -> dict[str, object]:
        file = self._files[measured.path]
        stated = {"bytes": file.size, "stamp": file.stamp, "real": file.real, "path": file.path}
        result = {"status": measured.status, "reason": measured.reason, "fix": measured.fix}
        return {**(measured.columns or {}), **stated, **result}
