"""One adapter of a batch: what is to be done with it, and doing it, in this process or in one that works for it.

A task and its outcome go through pipes to and from other processes, so both are plain data.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from loralens.core.adapter import Adapter
from loralens.core.messages import LEVELS, LOGGER
from loralens.core.progress import display_progress
from loralens.errors import LoraLensError, OptionError
from loralens.formats.files.json_text import finite_number, is_safe_text
from loralens.formats.files.leftovers import reserve
from loralens.formats.records.batches import (
    BEGUN,
    MOST_MESSAGES,
    BatchEntry,
    adapter_digest,
    output_digest,
)
from loralens.verbs.batches.batch_result import KINDS, BatchRow, Status
from loralens.verbs.batches.several import WORK
from loralens.verbs.inputs.adapters import AdapterSource
from loralens.version import __version__

Numbers = Mapping[str, Any]
Findings = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class AdapterWork:
    """What a verb does with one adapter of several.

    Attributes
    ----------
    run : callable
        ``run(source, output=…, overwrite=…, **keywords)``: does it and returns a result.
    numbers : callable
        Result → its important numbers as JSON values; their kinds are in `KINDS`.
    status : callable
        Result → ``written``, ``unchanged``, or ``no`` if the answer is no and nothing was written.
    answer : callable
        Numbers and keywords → the answer of the verb, also for numbers of an earlier run.
    findings : callable
        Result → the findings of the doctor.
    check : callable
        Options → nothing: raises the errors that are the same for every adapter, before anything is read.
    recall : callable
        The path of an output of an earlier run → the findings in it; None if it cannot be read.
    """

    run: Callable[..., Any]
    numbers: Callable[[Any], Numbers]
    status: Callable[[Any], Status] = lambda _: "written"
    answer: Callable[[Numbers, Mapping[str, Any]], bool] = lambda *_: True
    findings: Callable[[Any], Findings] = lambda _: []
    check: Callable[[Mapping[str, Any]], object] = lambda _: None
    recall: Callable[[Path], Findings | None] = lambda _: []


@dataclass(frozen=True, slots=True)
class BatchTask:
    """One adapter, and what the run wants of it.

    Attributes
    ----------
    row : BatchRow
        The name, source and target of the adapter.
    source : path or Adapter
    keywords : mapping of str to value
        The options of the verb, without ``output`` and ``overwrite``.
    options : str or None
        The digest of the options; None if they have none.
    entry : BatchEntry or None
        What the record of earlier runs says about the target.
    """

    verb: str
    row: BatchRow
    source: AdapterSource
    keywords: Mapping[str, Any]
    overwrite: bool = False
    options: str | None = None
    entry: BatchEntry | None = None

    @property
    def target(self) -> Path | None:
        """The place of the output."""
        return None if self.row.target is None else Path(self.row.target)

    @property
    def dry_run(self) -> bool:
        """Whether nothing is to be written."""
        return bool(self.keywords.get("dry_run"))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The row of an adapter that was worked on, and its entry for the record, which is None if the old one stays."""

    row: BatchRow
    entry: BatchEntry | None = None


def perform(task: BatchTask) -> Outcome:
    """Do what a task says. An error becomes a row with the status ``failed``, so that the others go on."""
    messages: list[str] = []
    with _messages_kept(messages), display_progress(None):
        try:
            outcome = _perform(task)
        except LoraLensError as error:
            outcome = failure(task, ": ".join((*error.where, error.what)), error.fix)
        except MemoryError:
            outcome = failure(task, "there is not enough memory", "give --jobs 1, or use a machine with more memory")
        except OSError as error:
            what = f"{error.filename or task.row.source}: {error.strerror or error}"
            outcome = failure(task, what, "check the path and its permissions")
        # One adapter must not stop two hundred others, whatever is wrong with it; its row reports the error.
        except Exception as error:  # noqa: BLE001
            outcome = failure(task, f"{type(error).__name__}: {error}", "report this as a bug")
    messages_kept = messages[:MOST_MESSAGES]
    entry = outcome.entry and replace(outcome.entry, messages=messages_kept)
    row = outcome.row if outcome.row.messages else replace(outcome.row, messages=messages_kept)
    return Outcome(row, entry)


def failure(task: BatchTask, reason: str, fix: str) -> Outcome:
    """The outcome of an adapter that could not be processed."""
    return Outcome(replace(task.row, status="failed", answer=None, reason=reason, fix=fix))


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


def _perform(task: BatchTask) -> Outcome:
    if task.verb not in WORK:  # in a new process
        import_module(f"loralens.verbs.{task.verb}")
    work, target, entry = WORK[task.verb](), task.target, task.entry
    if target is None:
        return _run(task, work, None)
    digest = output_digest(target)
    # It is read before the work. If the adapter changes meanwhile, the next run sees another digest and does it again.
    source = None if isinstance(task.source, Adapter) else adapter_digest(Path(task.source))
    vouched = entry is not None and entry.output is not None and entry.output == digest
    if entry and _is_up_to_date(task, entry, source) and (vouched or entry.status == "no"):
        skipped = _skip(task, work, entry)
        if skipped:
            return skipped
    # An output that this verb made from this adapter may be replaced.
    own = (
        entry is not None and entry.source != "" and (entry.verb, entry.source) == (task.verb, real_source(task.source))
    )
    if own and digest and not vouched and not (task.overwrite or task.dry_run):
        return _compare(task, work, source, digest)
    # A target without a digest may be a folder that holds only the outputs of other adapters in subfolders. Then
    # nothing in the folder is replaced.
    vacant = digest is None and target.is_dir()
    return _run(task, work, target, source=source, overwrite=task.overwrite or (own and vouched) or vacant)


def _is_up_to_date(task: BatchTask, entry: BatchEntry, source: str | None) -> bool:
    """Whether an entry is about the same verb, adapter and options, done by this version."""
    key = (task.verb, source, task.options, __version__)
    return entry.status != BEGUN and None not in key and key == (entry.verb, entry.input, entry.options, entry.version)


def _skip(task: BatchTask, work: AdapterWork, entry: BatchEntry) -> Outcome | None:
    """The row of an adapter that an earlier run has done; None if the record does not tell what is to be shown."""
    assert task.target
    numbers = read_numbers(task.verb, entry.numbers)
    # If the answer was no, there is no output that could be read.
    findings = [] if entry.status == "no" else work.recall(task.target)
    if numbers is None or findings is None:
        return None
    row = replace(
        task.row,
        # If the earlier answer was no, nothing was written then, and nothing is written now.
        status="no" if entry.status == "no" else "skipped",
        answer=work.answer(numbers, task.keywords),
        numbers=numbers,
        messages=entry.messages,
        findings=findings,
    )
    return Outcome(row)


def _compare(task: BatchTask, work: AdapterWork, source: str | None, digest: str) -> Outcome:
    """Do the work beside an output that a killed run may have written, and keep that output if it is the same.

    Between the last rename of the output and the new record a run can be killed. The record then does
    not say where the output came from, and a user may have put it there since.

    Raises
    ------
    OptionError
        The output is another one.
    """
    assert task.target
    with reserve(task.target, folder=True) as part:
        trial = part / task.target.name
        outcome = _run(task, work, trial, source=source)
        if outcome.row.status in ("written", "unchanged") and output_digest(trial) != digest:
            raise OptionError(f"{task.target}: exists", fix="choose another output folder, or give --overwrite")
    return Outcome(replace(outcome.row, target=task.row.target), outcome.entry)


def _run(
    task: BatchTask, work: AdapterWork, target: Path | None, *, source: str | None = None, overwrite: bool = False
) -> Outcome:
    """Do the work, and make the row and the entry of it."""
    result = work.run(task.source, output=target, overwrite=overwrite, **task.keywords)
    numbers, status = work.numbers(result), work.status(result)
    answer, findings = work.answer(numbers, task.keywords), work.findings(result)
    shown: Status = status if answer else "no"
    if (target is None or task.dry_run) and shown == "written":
        shown = "done"
    row = replace(task.row, status=shown, answer=answer, numbers=numbers, findings=findings)
    if target is None or task.dry_run:
        return Outcome(row)
    output = None if status == "no" else output_digest(target)
    place, version = real_source(task.source), __version__
    return Outcome(row, BatchEntry(task.verb, place, status, version, source, task.options, output, numbers))


def real_source(source: AdapterSource) -> str:
    """The real path of an adapter, by which the record knows it again; empty for an object."""
    if isinstance(source, Adapter):
        return ""
    real = os.path.realpath(source)  # Path.resolve raises an error for a link to itself
    # A byte of a path that is not UTF-8 cannot stand in the record.
    return real if is_safe_text(real) else ""


def read_numbers(verb: str, numbers: Numbers | None) -> Numbers | None:
    """The numbers of an entry, which come from a file; None if one is missing or not of its kind."""
    kinds = KINDS[verb]
    if numbers is None or numbers.keys() != kinds.keys():
        return None
    return numbers if all(_is_kind(numbers[key], kind) for key, kind in kinds.items()) else None


def _is_kind(value: object, kinds: tuple[type, ...]) -> bool:
    if not isinstance(value, kinds):
        return False
    if isinstance(value, list):
        return all(map(is_safe_text, value))
    if isinstance(value, int | float):
        # A whole number may be beyond float64, in which shares and sizes are computed.
        return isinstance(value, bool) or finite_number(value) is not None
    return is_safe_text(value) if isinstance(value, str) else True
