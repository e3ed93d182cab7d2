"""The run of a verb on several adapters: a list, or a folder that has adapters in it.

Each adapter is read, processed and written alone, in this process or in a pool of processes. A target that exists is
skipped, so the same command goes on where an earlier one has ended.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from importlib import import_module
from inspect import signature
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

from loralens.core.adapter import Adapter
from loralens.core.messages import LOGGER, display_progress, note, progress
from loralens.core.threads import share_processors
from loralens.errors import LoraLensError, OptionError
from loralens.formats.dialects.table import FORMATS
from loralens.formats.files.atomic import COMPANIONS, tidy, tidy_folder
from loralens.formats.files.disk import Hold, disk_errors
from loralens.formats.files.location import NAMES, SUFFIXES, file_in_folder, weights_among
from loralens.formats.models.model_files import resolve_path
from loralens.tables.numbers import count
from loralens.verbs.batches.batch_result import BatchResult, BatchRow
from loralens.verbs.shared.adapters import AdapterSource
from loralens.verbs.shared.option_values import check_counts

Options = Mapping[str, Any]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class AdapterWork:
    """What a verb does with one adapter of several.

    Attributes
    ----------
    run : callable
        ``run(source, output=…, overwrite=…, **keywords)``: does it and returns a result.
    describe : callable
        Result → fields of its `BatchRow`: ``numbers``, and a ``status`` or an ``answer`` that is not written and yes.
    check : callable
        Options → nothing: raises the errors that are the same for every adapter, before anything is read.
    recall : callable
        The path of a target that exists, and the keywords → the result that it holds; None if it holds none.
    """

    run: Callable[..., Any]
    describe: Callable[[Any], Mapping[str, Any]]
    check: Callable[[Options], object] = lambda _: None
    recall: Callable[[Path, Options], Any] = lambda *_: None


# Verb → what it does with one of several. A verb enters itself when its module is imported.
WORK: dict[str, AdapterWork] = {}


@dataclass(frozen=True, slots=True)
class BatchTask:
    """One adapter of several, and what the run wants of it.

    Attributes
    ----------
    options : mapping of str to value
        The keywords of the verb, without ``output`` and ``jobs``.
    name : str
        Its name among the others: relative to the folder in which it was found, or the last part of its path.
    single : bool
        Whether it is named by its file, and not by its folder.
    format : str
        Its dialect; empty if it cannot be read, which the verb then reports.
    target : Path or None
        The place of the output.
    """

    verb: str
    options: Options
    name: str
    source: AdapterSource
    single: bool = False
    format: str = ""
    target: Path | None = None

    @property
    def path(self) -> str:
        """The path, or the name of an object."""
        return self.name if isinstance(self.source, Adapter) else str(self.source)

    def tidy(self) -> None:
        """Remove what a killed process has left at the target, and put back what it had moved aside."""
        if self.target and not self.options.get("dry_run"):
            tidy(self.target)
            tidy_folder(self.target, lambda name: name in COMPANIONS or weights_among([name]))

    def row(self, **fields: Any) -> BatchRow:
        """The row of the adapter; it has failed unless there is another ``status``."""
        return BatchRow(self.name, self.path, None if self.target is None else str(self.target), **fields)


NameTarget = Callable[[BatchTask], PurePosixPath]


# ---- A verb for one adapter as a verb for several


def is_several(source: object) -> bool:
    """Whether a verb was given several adapters: a list, or a folder that is not an adapter itself but holds some."""
    if isinstance(source, list | tuple):
        return True
    if isinstance(source, Adapter) or not isinstance(source, str | os.PathLike):
        return False
    path = Path(source)
    try:
        # A damaged file does not make the folder of one adapter a collection.
        return path.is_dir() and not file_in_folder(path)
    except (LoraLensError, OSError):
        from loralens.formats.records.collection import candidates

        # An empty folder is not a collection. The verb itself reports what is missing, as for every path.
        return path.is_dir() and bool(candidates(path))


def in_batches(work: Callable[[Callable[..., Any]], AdapterWork]) -> Callable[[F], F]:
    """Let a verb that writes one adapter take several too, and then return a `BatchResult`.

    Parameters
    ----------
    work : callable
        The verb for one adapter → what it does with one of several.
    """

    def decorate(verb: F) -> F:
        name, parameters = verb.__name__, signature(verb)
        first = next(iter(parameters.parameters))
        WORK[name] = work(verb)

        @wraps(verb)
        def for_several(*arguments: Any, **keywords: Any) -> Any:
            source = arguments[0] if arguments else keywords.get(first)
            if not is_several(source):
                return verb(*arguments, **keywords)
            options = parameters.bind(*arguments, **keywords).arguments
            del options[first]
            chosen = list(source) if isinstance(source, list | tuple) else [cast("AdapterSource", source)]
            return run_batch(name, chosen, _adapter_target, options)

        return cast("F", for_several)

    return decorate


def _adapter_target(task: BatchTask) -> PurePosixPath:
    """The name of the output of a verb that writes adapters.

    A folder becomes a folder. A single file becomes a file with the suffix of the dialect that is written, if the
    dialect needs no other file. Otherwise it becomes a folder, since its companion files would collide with those of
    the adapters beside it.
    """
    name, dialect = PurePosixPath(task.name), task.options.get("to") or task.format
    files = next((form.files for form in FORMATS if form.name == dialect), None)
    # A file that cannot be read, or not be written, fails under its own name.
    if not task.single or files is None:
        return name
    stem = name.with_suffix("") if name.suffix in SUFFIXES else name
    return stem if files.config else stem.with_name(f"{stem.name}{Path(files.weights).suffix}")


# ---- The run


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
    keywords = {name: value for name, value in options.items() if name not in ("output", "jobs")}
    tasks = _find_adapters(partial(BatchTask, verb, keywords), adapters, output)
    if output:
        tasks = _place_targets(tasks, output, name_target)
    dry_run = bool(options.get("dry_run"))
    written = None if dry_run else output
    hold = Hold()
    if written:
        with disk_errors(written):
            written.mkdir(parents=True, exist_ok=True)
        hold.take(written)
    rows: dict[str, BatchRow] = {}
    try:
        # Closed with this block, so that no process stays behind.
        with progress(verb, len(tasks)) as step, closing(_perform_all(tasks, options.get("jobs") or 1)) as finished:
            for row in finished:
                rows[row.name] = row
                if step:
                    step(1)
    except KeyboardInterrupt:
        if written:
            note(f"{len(rows)} of {count(len(tasks), 'adapter')} were processed; the same command continues from there")
        raise
    finally:
        hold.release()
    return BatchResult(verb, [rows[task.name] for task in tasks], output, dry_run)


def _perform_all(tasks: Sequence[BatchTask], jobs: int) -> Generator[BatchRow, None, None]:
    """Perform tasks, and give the row of each when it is finished.

    Processes are killed if the caller wants no more or is interrupted.
    """
    # An adapter in memory may not be able to go to another process.
    if jobs == 1 or len(tasks) == 1 or any(isinstance(task.source, Adapter) for task in tasks):
        yield from map(perform, tasks)
        return
    # It takes 50 ms to import, and most runs have one adapter.
    from loralens.core.processes import ProcessKilled, perform_in_processes

    places = {task.target for task in tasks}

    def depth(task: BatchTask) -> int:
        return len(places.intersection(task.target.parents)) if task.target else 0

    left = {task.name: task for task in tasks}
    try:
        # What lies in the target of another task comes after it: a folder takes its place by a rename, which fails if
        # another process has made one there.
        for _, level in groupby(sorted(tasks, key=depth), depth):
            with closing(perform_in_processes(list(level), partial(_perform_shared, jobs=jobs), jobs)) as finished:
                for task, outcome in finished:
                    del left[task.name]
                    if isinstance(outcome, ProcessKilled):
                        fix = "use a machine with more memory if it is short"
                        outcome = task.row(reason="the process that worked on it was killed", fix=fix)
                    elif isinstance(outcome, BaseException):  # an option that cannot go to another process
                        outcome = task.row(reason=f"{type(outcome).__name__}: {outcome}", fix="give --jobs 1")
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
            return replace(_perform(task), messages=messages)
        except LoraLensError as error:
            what, fix = ": ".join((*error.where, error.what)), error.fix
        except MemoryError:
            what, fix = "there is not enough memory", "give fewer --jobs, or use a machine with more memory"
        except OSError as error:
            what = f"{error.filename or task.path}: {error.strerror or error}"
            fix = "check the path and its permissions"
        # One adapter must not stop two hundred others, whatever is wrong with it; its row reports the error.
        except Exception as error:  # noqa: BLE001
            what, fix = f"{type(error).__name__}: {error}", "report this as a bug"
    return task.row(reason=what, fix=fix, messages=messages)


def _perform(task: BatchTask) -> BatchRow:
    getattr(import_module("loralens"), task.verb)  # imports it in a new process
    work, target, keywords = WORK[task.verb], task.target, dict(task.options)
    overwrite, exists = bool(keywords.pop("overwrite", False)), False
    if target:
        task.tidy()
        is_folder = target.is_dir()
        files = {file.name for file in target.iterdir()} if is_folder else set()
        exists = bool(weights_among(files)) if is_folder else os.path.lexists(target)
        # A folder may hold only the outputs of other adapters in subfolders. Then nothing in it is replaced.
        overwrite = overwrite or (is_folder and not exists and files.isdisjoint(COMPANIONS))
    if target and exists and not overwrite:
        result = work.recall(target, keywords)
        return task.row(**({} if result is None else work.describe(result)), status="exists")
    result = work.run(task.source, output=target, overwrite=overwrite, **keywords)
    fields = {"status": "done" if target is None or keywords.get("dry_run") else "written", "answer": True}
    fields |= work.describe(result)
    return task.row(**fields if fields["answer"] else {**fields, "status": "no"})


@contextmanager
def _messages_kept(messages: list[str]) -> Iterator[None]:
    """Keep the messages of the block, which would tear the lines of a batch apart, instead of printing them."""

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(f"{record.levelname.lower().replace('info', 'note')}: {record.getMessage()}")

    before = LOGGER.handlers, LOGGER.level, LOGGER.propagate
    LOGGER.handlers, LOGGER.propagate = [Keeper()], False
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.handlers, _, LOGGER.propagate = before
        LOGGER.setLevel(before[1])


# ---- The adapters and their targets


def _find_adapters(
    make: Callable[..., BatchTask], adapters: Sequence[AdapterSource], output: Path | None
) -> list[BatchTask]:
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

    tasks: list[BatchTask] = []
    for number, source in enumerate(adapters, start=1):
        if isinstance(source, Adapter):
            tasks.append(make(f"adapter-{number}", source, format=source.format))
        elif not isinstance(source, str | os.PathLike):
            raise OptionError(f"{source!r} is not an adapter", fix="give a path, or what loralens.load returns")
        elif is_several(source):
            tasks += _in_folder(make, Path(source), output)
        else:
            path = Path(source)
            name = path.name if path.name not in ("", "..") else Path(os.path.realpath(path)).name
            task = make(name, source, path.is_file())
            examined = examine_file(path, once=bool(task.options.get("once")))
            tasks.append(replace(task, format=examined.adapter.format if examined.adapter else ""))
    if not tasks:
        raise OptionError("there is no adapter", fix="give adapters, or a folder that has some in it")
    fix = "rename one of them, or give the folder that holds both"
    _refuse_doubles(tasks, [task.name for task in tasks], "have the same name,", fix)
    return tasks


def _in_folder(make: Callable[..., BatchTask], root: Path, output: Path | None) -> Iterator[BatchTask]:
    """The adapters under a folder, with their paths relative to it as names."""
    from loralens.formats.records.collection import candidates, examine_file, note_repeated_links

    real, outside = Path(os.path.realpath(root)), Path(os.path.realpath(output)) if output else None
    if outside == real:
        raise OptionError(f"{output} is the folder of the adapters itself", fix="choose another output folder")
    links: list[Path] = []
    paths = candidates(root, linked=links.append)
    # The outputs of an earlier run may lie below the folder; they are not inputs.
    if outside and real in outside.parents:
        paths = [path for path in paths if not Path(os.path.realpath(path)).is_relative_to(outside)]
    note_repeated_links(root, paths, links)
    once = bool(make("", "").options.get("once"))
    entries = []
    with progress("looking", len(paths)) as step:
        for path in paths:
            entries.append(examine_file(path, once=once))
            if step:
                step(1)
    entries = [entry for entry in entries if entry.status != "other"]
    files = Counter(entry.path.parent for entry in entries)
    for entry in entries:
        path, dialect = entry.path, entry.adapter.format if entry.adapter else ""
        # An adapter that is alone in its folder is named by the folder if its file has a usual name, as all of PEFT's
        # files have. Any other adapter is named by its file. A folder that lacks the weights stands for itself.
        by_folder = path.name in NAMES and files[path.parent] == 1 and path.parent != root
        place = path.parent if by_folder else path
        name = place.relative_to(root).as_posix() if place != root else root.resolve().name
        yield make(name, str(place), not place.is_dir(), dialect)


def _refuse_doubles(tasks: Sequence[BatchTask], places: Sequence[object], what: str, fix: str) -> None:
    """Refuse two adapters in one place, because the output of one would replace that of the other."""
    for place, number in Counter(places).items():
        if number > 1:
            paths = [task.path for task, each in zip(tasks, places, strict=True) if each == place]
            raise OptionError(f"{' and '.join(paths)} {what} {place}", fix=fix)


def _place_targets(tasks: Sequence[BatchTask], output: Path, name_target: NameTarget) -> list[BatchTask]:
    """The tasks, each with its target in the output folder, under the name of the adapter.

    Raises
    ------
    OptionError
        Two adapters would have one target, the output folder is not a folder, or it overlaps with an adapter.
    """
    if output.suffix in SUFFIXES:
        raise OptionError(f"{output}: is the name of one file, and there are several adapters", fix="name a folder")
    other = "choose another output folder"
    if output.exists() and not output.is_dir():
        raise OptionError(f"{output}: is a file, not a folder", fix=other)
    targets = [output / name_target(task) for task in tasks]
    _refuse_doubles(tasks, targets, "would both be written to", "rename one of them, or write them into two folders")
    # Compared by sets of paths and not pair by pair: two hundred adapters have forty thousand pairs.
    sources = {os.path.realpath(task.source): task for task in tasks if not isinstance(task.source, Adapter)}
    real_output = Path(os.path.realpath(output))
    for folder in (real_output, *real_output.parents):
        if task := sources.get(str(folder)):
            raise OptionError(f"{output} lies within the adapter {task.path}", fix=other)
    real_targets = {os.path.realpath(target): target for target in targets}
    # The folder may come from somebody else.
    for real, target in real_targets.items():
        if real_output not in Path(real).parents:
            raise OptionError(f"{target} leads out of {output} by a link", fix=other)
    for real, task in sources.items():
        for path in (Path(real), *Path(real).parents):
            if covering := real_targets.get(str(path)):
                what = f"{covering} is or holds the adapter {task.path}, and would be written over"
                raise OptionError(what, fix=other)
    return [replace(task, target=target) for task, target in zip(tasks, targets, strict=True)]
