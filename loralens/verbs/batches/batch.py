"""The run of a verb on several adapters: a list, or a folder that has adapters in it."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any, cast
from urllib.parse import quote

from loralens.core.adapter import Adapter
from loralens.core.messages import note, warn
from loralens.core.progress import progress
from loralens.core.threads import processor_count
from loralens.errors import LoraLensError, OptionError
from loralens.formats.dialects.table import FORMATS
from loralens.formats.files.disk import disk_errors
from loralens.formats.files.hold import Hold
from loralens.formats.files.json_text import is_safe_text
from loralens.formats.files.location import SUFFIXES, adapter_file
from loralens.formats.models.base_digest import base_digest
from loralens.formats.models.model_location import resolve_path
from loralens.formats.records.batches import BEGUN, BatchEntry, BatchRecord, files_digest
from loralens.tables.numbers import count
from loralens.tables.text import display_width
from loralens.verbs.batches.batch_items import BatchItem, NameTarget, find_adapters, place_targets
from loralens.verbs.batches.batch_result import BatchResult, BatchRow, line_of
from loralens.verbs.batches.batch_task import BatchTask, Outcome, real_source
from loralens.verbs.batches.several import WORK
from loralens.verbs.inputs.adapters import AdapterSource
from loralens.version import __version__

Options = Mapping[str, Any]

# Options that do not change the output: whether an existing one is replaced, whether anything is written, and which
# findings decide the exit code.
_OF_THE_RUN = {"overwrite", "dry_run", "fail_on"}
_FILES = ("activations", "weights")  # options that may be paths of files, whose content counts

# Total size of the adapters, in bytes, from which worker processes save more time than they need to start. Each worker
# takes half a second of processor time to start, and in half a second `compress` processes about 10 MB.
WORTH_PROCESSES = 20_000_000
WIDEST_NAME = 32  # columns of a terminal that the names of adapters take at most in the lines

LineWatcher = Callable[[str], None]
_watcher: ContextVar[LineWatcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watch_lines(watcher: LineWatcher) -> Iterator[None]:
    """Let ``watcher`` see a line about every adapter of a batch within the block as soon as it is finished."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def adapter_target(options: Options) -> NameTarget:
    """How the outputs of a verb that writes adapters are named.

    A folder becomes a folder. A single file becomes a file with the suffix of the dialect that is written, if the
    dialect needs no other file. Otherwise it becomes a folder, since its companion files would collide with those of
    the adapters beside it.
    """
    to = options.get("to")

    def name_target(name: PurePosixPath, single: bool, dialect: str) -> PurePosixPath:
        files = next((form.files for form in FORMATS if form.name == (to or dialect)), None)
        # A file that cannot be read, or not be written, fails under its own name.
        if not single or files is None:
            return name
        stem = name.with_suffix("") if name.suffix in SUFFIXES else name
        suffix = Path(files.weights).suffix
        # The record of a pickle is a file beside it.
        alone = files.config is None and suffix != ".bin"
        return stem.with_name(f"{stem.name}{suffix}") if alone else stem

    return name_target


def run_batch(verb: str, adapters: Sequence[AdapterSource], name_target: NameTarget, options: Options) -> BatchResult:
    """Let a verb work on several adapters, and keep the record of it in the output folder.

    Parameters
    ----------
    adapters : sequence of path or Adapter
        Adapters, and folders that have some in them.
    name_target : callable
        How the outputs are named in the output folder.
    options : mapping of str to value
        The keywords of the verb, with ``output`` and ``jobs``.
    """
    # An error that concerns every adapter is raised once, before any work.
    WORK[verb]().check(options)
    if options.get("base") is not None:
        resolve_path(Path(options["base"]))
    keywords = {name: value for name, value in options.items() if name not in ("output", "jobs", "overwrite")}
    output = None if options.get("output") is None else Path(cast("str | PathLike[str]", options["output"]))
    dry_run = bool(options.get("dry_run"))
    reading = {name: bool(options.get(name)) for name in ("allow_pickle", "once")}
    items = find_adapters(adapters, output=output, **reading)
    jobs = _count_jobs(options.get("jobs"), items)
    targets = place_targets(items, output, name_target) if output else [None] * len(items)
    record = BatchRecord.read(output) if output else None
    digest = _digest_options(verb, options) if output else None
    names = [_entry_name(target, output) if target and output else "" for target in targets]
    tasks = [
        BatchTask(
            verb,
            BatchRow(item.name, item.path, None if target is None else str(target), "failed"),
            item.source,
            keywords,
            bool(options.get("overwrite")),
            digest,
            record.entries.get(name) if record else None,
        )
        for item, target, name in zip(items, targets, names, strict=True)
    ]
    hold = Hold()
    if output and not dry_run:
        with disk_errors(output):
            output.mkdir(parents=True, exist_ok=True)
        hold.take(output)
    try:
        outcomes = _perform(tasks, jobs, None if dry_run else record)
    finally:
        hold.release()
    rows = [outcomes[item.name] for item in items]
    return BatchResult(verb, rows, output, dry_run)


def _perform(tasks: Sequence[BatchTask], jobs: int, record: BatchRecord | None) -> dict[str, BatchRow]:
    """Perform the tasks, and write the record after each; returns the rows by the names of the adapters."""
    rows: dict[str, BatchRow] = {}
    if record:
        # The entries of an earlier run stay in the record until they are replaced.
        for task in tasks:
            begun = BatchEntry(task.verb, real_source(task.source), BEGUN, __version__)
            record.entries.setdefault(_entry_of(task, record), begun)
        if any(entry.status == BEGUN for entry in record.entries.values()):
            record.write()
    watcher = _watcher.get()
    width = min(WIDEST_NAME, max(display_width(task.row.name) for task in tasks))
    recorded = True
    try:
        # Processes take 5 ms to import, and most runs have one adapter.
        from loralens.verbs.batches.batch_workers import perform_all

        with progress(tasks[0].verb, len(tasks)) as step, closing(perform_all(tasks, jobs)) as outcomes:
            for task, outcome in outcomes:
                rows[task.row.name] = outcome.row
                if record:
                    recorded = _record_outcome(_entry_of(task, record), outcome, record, quiet=not recorded)
                if watcher:
                    watcher(line_of(task.verb, outcome.row, width))
                if step:
                    step(1)
    except KeyboardInterrupt:
        if record:
            note(f"{len(rows)} of {count(len(tasks), 'adapter')} were processed; the same command continues from there")
        raise
    return rows


def _record_outcome(name: str, outcome: Outcome, record: BatchRecord, *, quiet: bool) -> bool:
    """Write into the record what was done, if anything was; returns whether the record has it.

    If the disk is full, there is one warning, and the result still says what was done and what failed. The next record
    that can be written has all of it. If none can be written, the next run compares the output with what it makes.
    """
    if outcome.entry:
        record.entries[name] = outcome.entry
    elif record.entries[name].status == BEGUN:  # nothing was written there
        del record.entries[name]
    else:
        return not quiet
    try:
        record.write()
    except LoraLensError as error:
        if not quiet:
            warn(": ".join((*error.where, error.what)), fix=error.fix)
        return False
    return True


def _entry_of(task: BatchTask, record: BatchRecord) -> str:
    assert task.target
    return _entry_name(task.target, record.folder)


def _entry_name(target: Path, folder: Path) -> str:
    """The name of a target in the record."""
    name = target.relative_to(folder).as_posix()
    # JSON cannot hold bytes that are not text, and names with control characters are refused when a record is read.
    return name if is_safe_text(name) else quote(os.fsencode(name))


def _count_jobs(jobs: object, items: Sequence[BatchItem]) -> int:
    """The number of adapters that are processed at a time."""
    if jobs is None:
        # Small adapters are finished before worker processes would have started.
        worth = len(items) > 1 and sum(map(_source_bytes, items)) >= WORTH_PROCESSES
        return min(processor_count(), len(items)) if worth else 1
    if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1:
        raise OptionError(f"jobs {jobs!r:.100} is not a whole number from 1", fix="give a whole number from 1")
    return min(jobs, len(items))


def _source_bytes(item: BatchItem) -> int:
    """The size of an adapter's file; 0 if it cannot be read, or is an object."""
    if isinstance(item.source, Adapter):
        return 0
    with suppress(LoraLensError, OSError):
        return adapter_file(Path(item.source)).stat().st_size
    return 0


def _digest_options(verb: str, options: Options) -> str | None:
    """A digest of all options that decide the output; None if an option is an object that cannot be digested."""
    stated = {
        name: value
        for name, value in options.items()
        if name not in ("output", "jobs") and name not in _OF_THE_RUN and value not in (None, False, (), [])
    }
    from hashlib import sha256  # it loads OpenSSL, and runs of one adapter need no hash

    digests = {name: files_digest([Path(stated[name])]) for name in _FILES if _is_path(stated.get(name))}
    if stated.get("base") is not None:
        # A base under the same path may be another one tomorrow.
        digests["base"] = base_digest(resolve_path(Path(stated["base"])))
    try:
        text = json.dumps([verb, stated, digests], default=_plain, sort_keys=True)
    except TypeError:
        return None
    return sha256(text.encode()).hexdigest()


def _is_path(value: object) -> bool:
    return isinstance(value, str | PathLike) and Path(value).is_file()


def _plain(value: object) -> object:
    """Convert a value that JSON cannot represent into one that it can."""
    if isinstance(value, PathLike):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError
