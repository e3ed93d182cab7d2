"""The run of a verb on several adapters: a list, or a folder that has adapters in it.

Each adapter is read, processed and written alone, in this process or in a pool of processes. A target that exists is
skipped, so the same command goes on where an earlier one has ended.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial, wraps
from importlib import import_module
from inspect import signature
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

from loralens.core.adapter import Adapter
from loralens.core.messages import LEVELS, LOGGER, display_progress, note, progress
from loralens.core.threads import share_processors
from loralens.errors import LoraLensError, OptionError
from loralens.formats.dialects.table import FORMATS
from loralens.formats.files.atomic import COMPANIONS, tidy, tidy_folder
from loralens.formats.files.disk import Hold, disk_errors
from loralens.formats.files.location import NAMES, SUFFIXES, file_in_folder, weights_among
from loralens.formats.models.model_files import resolve_path
from loralens.tables.numbers import count
from loralens.tables.text import display_width
from loralens.verbs.batches.batch_result import BatchResult, BatchRow, Status, line_of
from loralens.verbs.shared.adapters import AdapterSource, Source
from loralens.verbs.shared.option_values import check_counts

Options = Mapping[str, Any]
LineWatcher = Callable[[str], None]
# What the name of a target is made of: the name of an adapter, whether it is a single file, and its dialect ("" if it
# cannot be read).
NameTarget = Callable[[PurePosixPath, bool, str], PurePosixPath]
F = TypeVar("F", bound=Callable[..., Any])

WIDEST_NAME = 32  # columns of a terminal that the names of adapters take at most in the lines
_watcher: ContextVar[LineWatcher | None] = ContextVar("watcher", default=None)


@dataclass(frozen=True, slots=True)
class AdapterWork:
    """What a verb does with one adapter of several.

    Attributes
    ----------
    run : callable
        ``run(source, output=…, overwrite=…, **keywords)``: does it and returns a result.
    numbers : callable
        Result → its important numbers as JSON values.
    status : callable
        Result → ``written`` or ``unchanged``.
    answer : callable
        Result → the answer of the verb.
    findings : callable
        Result → the findings of the doctor.
    check : callable
        Options → nothing: raises the errors that are the same for every adapter, before anything is read.
    recall : callable
        The path of a target that exists, and the keywords → the result that it holds; None if it holds none.
    """

    run: Callable[..., Any]
    numbers: Callable[[Any], Mapping[str, Any]]
    status: Callable[[Any], Status] = lambda _: "written"
    answer: Callable[[Any], bool] = lambda _: True
    findings: Callable[[Any], Sequence[Mapping[str, Any]]] = lambda _: []
    check: Callable[[Options], object] = lambda _: None
    recall: Callable[[Path, Options], Any] = lambda *_: None


# Verb → what it does with one of several. A verb enters itself when its module is imported.
WORK: dict[str, AdapterWork] = {}


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One adapter of several.

    Attributes
    ----------
    name : str
        Its name among the others: relative to the folder in which it was found, or the last part of its path.
    source : path or Adapter
    single : bool
        Whether it is named by its file, and not by its folder.
    format : str
        Its dialect; empty if it cannot be read, which the verb then reports.
    """

    name: str
    source: AdapterSource
    single: bool = False
    format: str = ""

    @property
    def path(self) -> str:
        """The path, or the name of an object."""
        return self.name if isinstance(self.source, Adapter) else str(self.source)


@dataclass(frozen=True, slots=True)
class BatchTask:
    """One adapter, and what the run wants of it; ``row`` has its name, its path and its target."""

    verb: str
    row: BatchRow
    source: AdapterSource
    keywords: Options
    overwrite: bool

    @property
    def target(self) -> Path | None:
        """The place of the output."""
        return None if self.row.target is None else Path(self.row.target)

    def tidy(self) -> None:
        """Remove what a killed process has left at the target, and put back what it had moved aside."""
        if self.target and not self.keywords.get("dry_run"):
            tidy(self.target)
            tidy_folder(self.target, lambda name: name in COMPANIONS or weights_among([name]))

    def failed(self, reason: str, fix: str) -> BatchRow:
        """The row of an adapter that could not be processed."""
        return replace(self.row, reason=reason, fix=fix)


# ---- A verb for one adapter as a verb for several


def is_several(source: Source) -> bool:
    """Whether a verb was given several adapters: a list, or a folder that is not an adapter itself but holds some."""
    if isinstance(source, list | tuple):
        return True
    # A sequence of another type is refused later, because it is not an adapter.
    return not isinstance(source, Adapter) and isinstance(source, str | os.PathLike) and _is_collection(Path(source))


def _is_collection(path: Path) -> bool:
    try:
        if not path.is_dir():
            return False
        # A damaged file does not make the folder of one adapter a collection.
        file_in_folder(path)
    except (LoraLensError, OSError):
        from loralens.formats.records.collection import candidates

        # An empty folder is not a collection. The verb itself reports what is missing, as for every path.
        return path.is_dir() and bool(candidates(path))
    return False


def one_adapter(source: Source) -> AdapterSource:
    """The adapter that a verb was given; several have been taken by `in_batches`."""
    assert not isinstance(source, list | tuple)
    return cast("AdapterSource", source)


def in_batches(work: Callable[[Callable[..., Any]], AdapterWork]) -> Callable[[F], F]:
    """Let a verb that writes one adapter take several too, and then return a `BatchResult`.

    Parameters
    ----------
    work : callable
        The verb for one adapter → what it does with one of several.
    """

    def decorate(verb: F) -> F:
        name, first = verb.__name__, next(iter(signature(verb).parameters))
        WORK[name] = work(verb)

        @wraps(verb)
        def for_several(*arguments: Any, **keywords: Any) -> Any:
            source = arguments[0] if arguments else keywords.get(first)
            if not is_several(cast("Source", source)):
                return verb(*arguments, **keywords)
            options = signature(verb).bind(*arguments, **keywords).arguments
            adapters = options.pop(first)
            chosen = adapters if isinstance(adapters, list | tuple) else [adapters]
            return run_batch(name, chosen, partial(_adapter_target, options.get("to")), options)

        return cast("F", for_several)

    return decorate


def _adapter_target(to: str | None, name: PurePosixPath, single: bool, dialect: str) -> PurePosixPath:
    """The name of the output of a verb that writes adapters.

    A folder becomes a folder. A single file becomes a file with the suffix of the dialect that is written, if the
    dialect needs no other file. Otherwise it becomes a folder, since its companion files would collide with those of
    the adapters beside it.
    """
    files = next((form.files for form in FORMATS if form.name == (to or dialect)), None)
    # A file that cannot be read, or not be written, fails under its own name.
    if not single or files is None:
        return name
    stem = name.with_suffix("") if name.suffix in SUFFIXES else name
    suffix = Path(files.weights).suffix
    # The record of a pickle is a file beside it.
    alone = files.config is None and suffix != ".bin"
    return stem.with_name(f"{stem.name}{suffix}") if alone else stem


# ---- The run


@contextmanager
def watch_lines(watcher: LineWatcher) -> Iterator[None]:
    """Let ``watcher`` see a line about every adapter of a batch within the block as soon as it is finished."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def run_batch(verb: str, adapters: Sequence[AdapterSource], name_target: NameTarget, options: Options) -> BatchResult:
    """Let a verb work on several adapters.

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
    WORK[verb].check(options)
    if options.get("base") is not None:
        resolve_path(Path(options["base"]))
    check_counts(jobs=options.get("jobs"))
    output = None if options.get("output") is None else Path(options["output"])
    dry_run, overwrite = bool(options.get("dry_run")), bool(options.get("overwrite"))
    items = _find_adapters(adapters, output, once=bool(options.get("once")))
    targets = _place_targets(items, output, name_target) if output else [None] * len(items)
    keywords = {name: value for name, value in options.items() if name not in ("output", "jobs", "overwrite")}
    tasks = [
        BatchTask(
            verb,
            BatchRow(item.name, item.path, None if target is None else str(target)),
            item.source,
            keywords,
            overwrite,
        )
        for item, target in zip(items, targets, strict=True)
    ]
    hold = Hold()
    if output and not dry_run:
        with disk_errors(output):
            output.mkdir(parents=True, exist_ok=True)
        hold.take(output)
    rows: dict[str, BatchRow] = {}
    watcher = _watcher.get()
    width = min(WIDEST_NAME, max(display_width(item.name) for item in items))
    try:
        # Closed with this block, so that no process stays behind.
        with progress(verb, len(tasks)) as step, closing(_perform_all(tasks, options.get("jobs") or 1)) as finished:
            for row in finished:
                rows[row.name] = row
                if watcher:
                    watcher(line_of(verb, row, width))
                if step:
                    step(1)
    except KeyboardInterrupt:
        if output and not dry_run:
            note(f"{len(rows)} of {count(len(tasks), 'adapter')} were processed; the same command continues from there")
        raise
    finally:
        hold.release()
    return BatchResult(verb, [rows[item.name] for item in items], output, dry_run)


def _perform_all(tasks: Sequence[BatchTask], jobs: int) -> Generator[BatchRow, None, None]:
    """Perform tasks, and give the row of each when it is finished."""
    # An adapter in memory may not be able to go to another process.
    if jobs == 1 or len(tasks) == 1 or any(isinstance(task.source, Adapter) for task in tasks):
        yield from map(perform, tasks)
        return
    # What lies in the target of another task comes after it: a folder takes its place by a rename, which fails if
    # another process has made one there.
    places = {task.target for task in tasks}
    depths = [len(places.intersection(task.target.parents)) if task.target else 0 for task in tasks]
    for depth in sorted({*depths}):
        yield from _perform_in_processes(
            [task for task, each in zip(tasks, depths, strict=True) if each == depth], jobs
        )


def _perform_in_processes(tasks: Sequence[BatchTask], jobs: int) -> Iterator[BatchRow]:
    """Perform tasks in processes, which are killed if the caller wants no more or is interrupted."""
    # It takes 50 ms to import, and most runs have one adapter.
    from loralens.core.processes import ProcessKilled, perform_in_processes

    left = {task.row.name: task for task in tasks}
    try:
        with closing(perform_in_processes(tasks, partial(_perform_shared, jobs=jobs), jobs)) as finished:
            for task, outcome in finished:
                del left[task.row.name]
                if isinstance(outcome, ProcessKilled):
                    what = "the process that worked on it was killed"
                    outcome = task.failed(what, "use a machine with more memory if it is short")
                elif isinstance(outcome, BaseException):  # an option that cannot go to another process
                    outcome = task.failed(f"{type(outcome).__name__}: {outcome}", "give --jobs 1")
                yield outcome
    finally:
        for task in left.values():
            task.tidy()


def _perform_shared(task: BatchTask, *, jobs: int) -> BatchRow:
    """Perform a task in one of several processes."""
    share_processors(jobs)
    return perform(task)


def perform(task: BatchTask) -> BatchRow:
    """Do what a task says. An error becomes a row with the status ``failed``, so that the others go on."""
    messages: list[str] = []
    with _messages_kept(messages), display_progress(None):
        try:
            row = _perform(task)
        except LoraLensError as error:
            row = task.failed(": ".join((*error.where, error.what)), error.fix)
        except MemoryError:
            row = task.failed("there is not enough memory", "give fewer --jobs, or use a machine with more memory")
        except OSError as error:
            what = f"{error.filename or task.row.source}: {error.strerror or error}"
            row = task.failed(what, "check the path and its permissions")
        # One adapter must not stop two hundred others, whatever is wrong with it; its row reports the error.
        except Exception as error:  # noqa: BLE001
            row = task.failed(f"{type(error).__name__}: {error}", "report this as a bug")
    return replace(row, messages=messages)


def _perform(task: BatchTask) -> BatchRow:
    getattr(import_module("loralens"), task.verb)  # imports it in a new process
    work, target, overwrite = WORK[task.verb], task.target, task.overwrite
    exists = False
    if target:
        task.tidy()
        is_folder = target.is_dir()
        files = {file.name for file in target.iterdir()} if is_folder else set()
        exists = bool(weights_among(files)) if is_folder else os.path.lexists(target)
        # A folder may hold only the outputs of other adapters in subfolders. Then nothing in it is replaced.
        overwrite = overwrite or (is_folder and not exists and files.isdisjoint(COMPANIONS))
    status: Status
    if exists and not overwrite:
        assert target
        result, status = work.recall(target, task.keywords), "exists"
        if result is None:
            return replace(task.row, status=status)
    else:
        result = work.run(task.source, output=target, overwrite=overwrite, **task.keywords)
        status = work.status(result)
        if status == "written" and (target is None or task.keywords.get("dry_run")):
            status = "done"
    answer, numbers = work.answer(result), work.numbers(result)
    status = status if answer or status == "exists" else "no"
    return replace(task.row, status=status, answer=answer, numbers=numbers, findings=work.findings(result))


@contextmanager
def _messages_kept(messages: list[str]) -> Iterator[None]:
    """Keep the messages of the block, which would tear the lines of a batch apart, instead of printing them."""

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            name = next((name for name, number in LEVELS.items() if number == record.levelno), record.levelname)
            messages.append(f"{name.lower()}: {record.getMessage()}")

    before = LOGGER.handlers, LOGGER.level, LOGGER.propagate
    LOGGER.handlers, LOGGER.propagate = [Keeper()], False
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.handlers, _, LOGGER.propagate = before
        LOGGER.setLevel(before[1])


# ---- The adapters and their targets


def _find_adapters(adapters: Sequence[AdapterSource], output: Path | None, *, once: bool) -> list[BatchItem]:
    """The adapters that were named and those under the folders that were named, each with its name.

    Files that hold tensors and no LoRA pairs are left out; those that cannot be read are not. What lies under
    ``output`` is not an input, so the output folder may be inside a folder of adapters.

    Raises
    ------
    OptionError
        There is no adapter, a path does not exist, or two adapters have one name.
    """
    # Imported here, as the folder of one adapter needs no search.
    from loralens.formats.records.collection import examine_file

    items: list[BatchItem] = []
    for number, source in enumerate(adapters, start=1):
        if isinstance(source, Adapter):
            items.append(BatchItem(f"adapter-{number}", source, format=source.format))
        elif not isinstance(source, str | os.PathLike):
            raise OptionError(f"{source!r} is not an adapter", fix="give a path, or what loralens.load returns")
        elif _is_collection(Path(source)):
            items += _in_folder(Path(source), output, once=once)
        else:
            path = Path(source)
            examined = examine_file(path, once=once)
            name = path.name if path.name not in ("", "..") else Path(os.path.realpath(path)).name
            items.append(BatchItem(name, source, path.is_file(), examined.adapter.format if examined.adapter else ""))
    if not items:
        raise OptionError("there is no adapter", fix="give adapters, or a folder that has some in it")
    fix = "rename one of them, or give the folder that holds both"
    _refuse_doubles(items, [item.name for item in items], "have the same name,", fix)
    return items


def _in_folder(root: Path, output: Path | None, *, once: bool) -> Iterator[BatchItem]:
    """The adapters under a folder, with their paths relative to it as names."""
    from loralens.formats.records.collection import candidates, examine_file, note_repeated_links

    real, outside = Path(os.path.realpath(root)), Path(os.path.realpath(output)) if output else None
    if outside == real:
        raise OptionError(f"{output} is the folder of the adapters itself", fix="choose another output folder")
    # The outputs of an earlier run may lie below the folder; they are not inputs.
    outputs = outside if outside and real in outside.parents else None
    links: list[Path] = []
    found = candidates(root, linked=links.append)
    paths = [path for path in found if not (outputs and Path(os.path.realpath(path)).is_relative_to(outputs))]
    note_repeated_links(root, paths, links)
    entries = []
    with progress("looking", len(paths)) as step:
        for path in paths:
            entry = examine_file(path, once=once)
            if entry.status != "other":
                entries.append(entry)
            if step:
                step(1)
    files = Counter(entry.path.parent for entry in entries)
    for entry in entries:
        path, dialect = entry.path, entry.adapter.format if entry.adapter else ""
        # An adapter that is alone in its folder is named by the folder if its file has a usual name, as all of PEFT's
        # files have. Any other adapter is named by its file. A folder that lacks the weights stands for itself.
        by_folder = path.name in NAMES and files[path.parent] == 1 and path.parent != root
        place = path.parent if by_folder else path
        name = place.relative_to(root).as_posix() if place != root else root.resolve().name
        yield BatchItem(name, str(place), not place.is_dir(), dialect)


def _refuse_doubles(items: Sequence[BatchItem], places: Sequence[object], what: str, fix: str) -> None:
    """Refuse two adapters in one place, because the output of one would replace that of the other."""
    for place, number in Counter(places).items():
        if number > 1:
            paths = [item.path for item, each in zip(items, places, strict=True) if each == place]
            raise OptionError(f"{' and '.join(paths)} {what} {place}", fix=fix)


def _place_targets(items: Sequence[BatchItem], output: Path, name_target: NameTarget) -> list[Path]:
    """The target of every adapter in the output folder, under the name of the adapter.

    Raises
    ------
    OptionError
        Two adapters would have one target, the output folder is not a folder, or it overlaps with an adapter.
    """
    if output.suffix in SUFFIXES:
        raise OptionError(f"{output}: is the name of one file, and there are several adapters", fix="name a folder")
    if output.exists() and not output.is_dir():
        raise OptionError(f"{output}: is a file, not a folder", fix="choose another output folder")
    targets = [output / name_target(PurePosixPath(item.name), item.single, item.format) for item in items]
    fix = "rename one of them, or write them into two folders"
    _refuse_doubles(items, targets, "would both be written to", fix)
    _check_apart(items, output, targets)
    return targets


def _check_apart(items: Sequence[BatchItem], output: Path, targets: Sequence[Path]) -> None:
    """Refuse targets that are, hold or lie in one of the adapters; each verb checks the one that it writes again."""
    # Compared by sets of paths and not pair by pair: two hundred adapters have forty thousand pairs.
    sources = {os.path.realpath(item.source): item for item in items if not isinstance(item.source, Adapter)}
    real_output = Path(os.path.realpath(output))
    for folder in (real_output, *real_output.parents):
        if item := sources.get(str(folder)):
            raise OptionError(f"{output} lies within the adapter {item.path}", fix="choose another output folder")
    real_targets = {os.path.realpath(target): target for target in targets}
    # The folder may come from somebody else.
    for real, target in real_targets.items():
        if real_output not in Path(real).parents:
            raise OptionError(f"{target} leads out of {output} by a link", fix="choose another output folder")
    for real, item in sources.items():
        for path in (Path(real), *Path(real).parents):
            if covering := real_targets.get(str(path)):
                what = f"{covering} is or holds the adapter {item.path}, and would be written over"
                raise OptionError(what, fix="choose another output folder")
