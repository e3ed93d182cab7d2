"""The run of a verb on several adapters: a list, or a folder that has adapters in it.

Each adapter is read, processed and written alone, in this process or in a pool of processes. A target that exists is
skipped, so the same command goes on where an earlier one has ended.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial, wraps
from importlib import import_module
from inspect import signature
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar, cast, get_args

from loralens.choices import Server
from loralens.core.adapter import Adapter
from loralens.core.messages import display_progress, messages_to, note, progress
from loralens.core.names import some
from loralens.core.threads import share_processors
from loralens.errors import LoraLensError, OptionError, as_typed, spell
from loralens.exports import bind
from loralens.formats.dialects.dialect_table import FORMATS
from loralens.formats.files.atomic import COMPANIONS, tidy, tidy_folder
from loralens.formats.files.disk import Hold, disk_errors
from loralens.formats.files.location import NAMES, SUFFIXES, file_in_folder, weights_among
from loralens.formats.models.model_files import resolve_path
from loralens.tables.numbers import count, join_words, percent, size
from loralens.tables.result import ResultSequence
from loralens.tables.table import ALWAYS, Column, Keys, Table, label_column, rows_key
from loralens.verbs.shared.adapters import AdapterSource, Source, as_source, sources
from loralens.verbs.shared.options import check_counts

# ``done`` is the status if nothing was to be written: in a dry run, or without an output folder.
Status = Literal["written", "unchanged", "larger", "no", "done", "exists", "failed"]
NAMED = 8  # adapters that one sentence names; the table has all of them
STATUSES: tuple[Status, ...] = ("written", "done", "unchanged", "larger", "exists", "no", "failed")


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One row: an adapter of several, and what the verb did with it.

    Attributes
    ----------
    name : str
        The name of the adapter among the others.
    source : str
        Its path.
    target : str or None
        Where its output is; None without an output folder.
    status : str
        ``written``; ``unchanged``, if it was written as it was, or would be; ``larger``, if the
        file of a compressed adapter is larger than before, or would be; ``no``, if the answer of the verb is no;
        ``done``, if nothing was to be written; ``exists``, if it was skipped because its target exists; ``failed``.
    answer : bool or None
        The answer of the verb; None if the adapter was skipped or could not be processed. For the doctor it is also
        the answer about findings that exist already.
    numbers : mapping of str to value
        The important numbers of this verb, as JSON values.
    reason, fix : str
        Why it could not be processed, and what the user can do.
    messages : sequence of str
        The messages about this adapter, each after its level.
    findings : sequence of mapping
        The findings of the doctor, as its JSON has them.
    """

    name: str
    source: str
    target: str | None
    status: Status = "failed"
    answer: bool | None = None
    numbers: Mapping[str, Any] | None = None
    reason: str = ""
    fix: str = ""
    messages: Sequence[str] = ()
    findings: Sequence[Mapping[str, Any]] = ()

    def number(self, key: str) -> Any:
        """One of the numbers; None if there is none."""
        return (self.numbers or {}).get(key)


@dataclass(frozen=True, slots=True, repr=False)
class BatchResult(ResultSequence[BatchRow]):
    """Several adapters that one verb has worked on; the result is a sequence of rows in the order of the adapters.

    Attributes
    ----------
    verb : str
        The name of the verb.
    rows : sequence of BatchRow
    output : Path or None
        The folder of the outputs.
    dry_run : bool
        Whether nothing was to be written.
    """

    contents = "rows"

    verb: str
    rows: Sequence[BatchRow]
    output: Path | None = None
    dry_run: bool = False

    @property
    def failed(self) -> list[BatchRow]:
        """The adapters that could not be processed."""
        return [row for row in self.rows if row.status == "failed"]

    @property
    def answered_no(self) -> list[BatchRow]:
        """The adapters about which the answer is no."""
        return [row for row in self.rows if row.answer is False]

    @property
    def answer(self) -> bool:
        """Whether every adapter was processed, and no answer is no."""
        return not (self.failed or self.answered_no)

    def tables(self) -> list[Table[BatchRow]]:
        """The adapters, one per row."""
        titled = [column for column in COLUMNS[self.verb] if column.title]
        outcome: Column[BatchRow] = label_column("status", "result", lambda row: _outcome(self.verb, row))
        columns = [NAME, *titled, outcome]
        return [Table(count(len(self.rows), "adapter"), columns, self.rows)]

    def listing(self) -> list[Table[BatchRow]]:
        """The adapters with all their numbers."""
        return [Table("adapters", [*IDENTITY, *COLUMNS[self.verb], *REASONS], self.rows)]

    def conclusion(self) -> list[str]:
        """How many adapters there are of each status; then which of them failed, have errors, or are answered no."""
        words, statuses = WORDS[self.verb], Counter(row.status for row in self.rows)
        parts = [f"{statuses[status]:,} {words[status]}" for status in STATUSES if statuses[status]]
        if len(parts) == 1:
            parts = [f"{'all ' if len(self.rows) > 1 else ''}{words[self.rows[0].status]}"]
        place = f"{self.output}: " if self.output else ""
        sentences = [f"{place}{count(len(self.rows), 'adapter')}, {join_words(parts)}{self._size_change()}."]
        if statuses["exists"]:
            sentences.append("What exists was skipped, whatever made it; --overwrite makes it again.")
        if self.failed:
            sentences.append(f"Failed: {_names(self.failed)}.")
        if larger := [row for row in self.rows if row.status == "larger"]:
            sentences.append(f"Larger than before: {_names(larger)}.")
        if refused := [row for row in self.answered_no if row.status != "larger"]:
            sentences.append(f"{words['answer']}: {_names(refused)}.")
        elif self.verb == "doctor":
            # An examined adapter may still have faults, so the first sentence alone would mislead.
            by_level = {level: [row for row in self.rows if row.number(f"{level}s")] for level in ("error", "warning")}
            sentences += [f"With {level}s: {_names(rows)}." for level, rows in by_level.items() if rows]
        return sentences

    def _size_change(self) -> str:
        """The size of all adapters before and after, for a verb that makes them smaller."""
        rows = [row for row in self.rows if row.number("bytes_before") and row.status != "no"]
        before, after = (sum(row.number(key) for row in rows) for key in ("bytes_before", "bytes_after"))
        if not rows or after >= before:
            return ""
        return f"; {size(before)} → {size(after)}, {percent(1 - after / before)} smaller"

    def sentences(self) -> list[str]:
        """Why adapters could not be processed, or have errors, those with one reason together; which gave warnings."""
        causes: dict[tuple[str, str], list[BatchRow]] = {}
        for row in self.failed:
            causes.setdefault((_without_place(row), row.fix), []).append(row)
        for row in self.rows:
            # One of each kind, as all modules may have it.
            errors = {finding["code"]: finding for finding in reversed(row.findings) if finding["level"] == "error"}
            for finding in errors.values():
                causes.setdefault((_finding_text(finding), finding["fix"]), []).append(row)
        lines = []
        for (reason, fix), rows in causes.items():
            lines += [f"{_names(rows)}: {reason}", f"  fix: {fix}"]
        if warned := [row for row in self.rows if any(not text.startswith("note:") for text in row.messages)]:
            lines.append(f"{count(len(warned), 'adapter')} gave warnings: {_names(warned)} (--verbose shows them)")
        return lines

    def details(self) -> list[str]:
        """Every finding and message, each after the name of its adapter."""
        lines = []
        for row in self.rows:
            lines += [f"{row.name}: {_finding_text(finding)}" for finding in row.findings]
            lines += [f"{row.name}: {text}" for text in row.messages]
        return lines

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "verb",
            Column(
                "target",
                lambda result: str(result.output) if result.output and not result.dry_run else None,
                type=str | None,
            ),
            rows_key(
                "adapters",
                json_columns(None),
                BatchRow,
                lambda result: Table("", json_columns(result.verb), result.rows),
            ),
            Column(
                "counts",
                lambda result: {status: sum(row.status == status for row in result.rows) for status in STATUSES},
                type=dict[str, int],
            ),
            "answer",
        )


def _names(rows: Sequence[BatchRow]) -> str:
    """The names of adapters as in a sentence, not more than a few."""
    names = [row.name for row in rows]
    return join_words(names) if len(names) <= NAMED else some(names, NAMED)


def _finding_text(finding: Mapping[str, Any]) -> str:
    module = f"{finding['module']}: " if finding["module"] else ""
    return f"{finding['level']}: {finding['code']}: {module}{finding['evidence']}"


def _without_place(row: BatchRow) -> str:
    """The reason of a failure without the paths of the adapter, of its output or their files, that it begins with."""
    reason = row.reason
    while True:
        place, colon, tail = reason.partition(": ")
        paths = [path for path in (row.source, row.target) if path]
        if not colon or not any(place == path or place.startswith(f"{path}/") for path in paths):
            return reason
        reason = tail


# Status → its word for each verb; ``answer`` begins the sentence about answers that are no.
_WORDS = {"unchanged": "unchanged", "exists": "skipped", "failed": "failed"}
WORDS: Mapping[str, Mapping[str, str]] = {
    "compress": {
        **_WORDS,
        "written": "compressed",
        "larger": "larger",
        "no": "not written",
        "done": "would be compressed",
        "answer": "Not written, as it would not become smaller",
    },
    "convert": {**_WORDS, "written": "converted", "done": "would be converted"},
    "scale": {**_WORDS, "written": "scaled", "done": "would be scaled"},
    "doctor": {
        **_WORDS,
        "written": "examined",
        "no": "not accepted",
        "done": "examined",
        "answer": "With findings of the level of --fail-on, or a more serious one",
    },
}


def _outcome(verb: str, row: BatchRow) -> str:
    """What happened to an adapter, in words; that it was skipped because it exists is said of all of them together."""
    return "exists" if row.status == "exists" else WORDS[verb][row.status]


def _number(
    key: str, title: str = "", *, text: Callable[[Any], str] = str, type: Any = int | None, **options: Any
) -> Column[BatchRow]:
    """A column of one of the numbers; empty for an adapter without it."""
    return Column(
        key,
        lambda row: row.number(key),
        title,
        lambda value: "" if value is None else text(value),
        type=type,
        **options,
    )


COLUMNS: Mapping[str, Sequence[Column[BatchRow]]] = {
    "compress": [
        _number("modules"),
        _number("rank_before", "r", priority=7),
        _number("rank_after", "r'", priority=8),
        _number("bytes_before", "size", text=size, priority=5),
        _number("bytes_after", "after", text=size, priority=6),
        _number("relative_error", "error", text=percent, type=float, priority=ALWAYS),
        _number("smaller", type=bool | None),
    ],
    "convert": [
        _number("modules", "modules", priority=4),
        _number("format_before", "from", type=str | None, align="left", priority=7),
        _number("format", "to", type=str | None, align="left", priority=8),
        _number("truncation", "truncation", text=percent, type=float, priority=5),
        _number("rounding", "rounding", text=percent, type=float, priority=6),
    ],
    "scale": [
        _number("modules", "modules", priority=8),
        _number("format", "format", type=str | None, align="left", priority=4),
        _number("bytes", "size", text=size, priority=6),
    ],
    "doctor": [
        _number("modules", "modules", priority=4),
        _number("errors", "errors", priority=8),
        _number("warnings", "warnings", priority=7),
        _number("notes", "notes", priority=6),
        _number("codes", "kinds", text=", ".join, type=list[str] | None, align="left", priority=5),
    ],
}


def json_columns(verb: str | None) -> Sequence[Column[BatchRow]]:
    """The columns in JSON of a verb; for None those of every verb, of which an object has some."""
    numbers = COLUMNS[verb] if verb else {column.key: column for each in COLUMNS.values() for column in each}.values()
    findings = [FINDINGS] if verb in (None, "doctor") else []
    return [*IDENTITY, *(replace(column, may_lack=True) for column in numbers), *REASONS, *findings, Column("messages")]


NAME: Column[BatchRow] = label_column("name", "adapter")
IDENTITY: Sequence[Column[BatchRow]] = (
    NAME,
    Column("source"),
    Column("target"),
    Column("status"),
    Column("answer"),
)
REASONS: Sequence[Column[BatchRow]] = (
    Column("reason"),
    Column("fix"),
)
FINDINGS: Column[BatchRow] = Column("findings", may_lack=True)


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
    format : str
        Its dialect; empty if it cannot be read, which the verb then reports.
    target : Path or None
        The place of the output.
    """

    verb: str
    options: Options
    name: str
    source: AdapterSource
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


def in_batches(describe: Callable[[Any], Mapping[str, Any]], *, check: Callable[[Options], object]) -> Callable[[F], F]:
    """Let a verb that writes one adapter take several too, and then return a `BatchResult`.

    The arguments are those of its `AdapterWork`.
    """

    def decorate(verb: F) -> F:
        name, parameters = verb.__name__, signature(verb)
        first = next(iter(parameters.parameters))
        WORK[name] = AdapterWork(verb, describe, check)

        @wraps(verb)
        def for_several(*arguments: Any, **keywords: Any) -> Any:
            source = as_source(arguments[0] if arguments else keywords.get(first))
            if not is_several(source):
                return verb(*arguments, **keywords)
            options = bind(name, parameters, arguments, keywords).arguments
            del options[first]
            return run_batch(name, sources([cast("Source", source)]), _adapter_target, options)

        return cast("F", for_several)

    return decorate


def _adapter_target(task: BatchTask) -> PurePosixPath:
    """The name of the output of a verb that writes adapters.

    A folder becomes a folder. A single file becomes a file with the suffix of the dialect that is written, if the
    dialect needs no other file. Otherwise it becomes a folder, since its companion files would collide with those of
    the adapters beside it.
    """
    name, dialect = PurePosixPath(task.name), task.options.get("to") or task.format
    if dialect in get_args(Server):
        from loralens.analysis.clients import CLIENTS  # few conversions are for a server

        dialect = CLIENTS[cast("Server", dialect)].target
    files = next((form.files for form in FORMATS if form.name == dialect), None)
    # A file that cannot be read, or not be written, fails under its own name.
    if files is None or isinstance(task.source, Adapter) or not Path(task.source).is_file():
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
    if isinstance(options.get("base"), str | os.PathLike):
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
                messages = [*map(spell, row.messages)]
                rows[row.name] = replace(row, reason=spell(row.reason), fix=spell(row.fix), messages=messages)
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
    keeper = _Keeper()
    # Another process does not know where the row is shown: its options are spelled in the process of the run.
    with as_typed(), messages_to(keeper), display_progress(None):
        try:
            return replace(_perform(task), messages=keeper.messages)
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
    return task.row(reason=what, fix=fix, messages=keeper.messages)


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
    return task.row(**fields if fields["answer"] or fields["status"] == "larger" else {**fields, "status": "no"})


class _Keeper(logging.Handler):
    """Keeps messages, which would tear the lines of a batch apart, instead of printing them."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"{record.levelname.lower().replace('info', 'note')}: {record.getMessage()}")


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
        elif is_several(source):
            tasks += _in_folder(make, Path(source), output)
        else:
            path = Path(source)
            name = path.name if path.name not in ("", "..") else Path(os.path.realpath(path)).name
            task = make(name, source)
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
        yield make(name, str(place), dialect)


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
