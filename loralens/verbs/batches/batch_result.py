"""The result of a verb that was given several adapters: one row for each of them, and the sentences about all."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from loralens.core.names import some
from loralens.tables.numbers import count, join_words, percent, size
from loralens.tables.result import ResultSequence
from loralens.tables.table import ALWAYS, Column, Keys, Table, rows_key

# ``done`` is the status if nothing was to be written: in a dry run, or without an output folder.
Status = Literal["written", "unchanged", "no", "done", "exists", "failed"]
NAMED = 8  # adapters that one sentence names; the table has all of them
STATUSES: tuple[Status, ...] = ("written", "done", "unchanged", "exists", "no", "failed")


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
        ``written``; ``unchanged``, if it was written as it was, or would be; ``no``, if the answer of the verb is no;
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
        outcome: Column[BatchRow] = Column(
            "status", lambda row: _outcome(self.verb, row), "result", align="left", priority=ALWAYS
        )
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
        if self.answered_no:
            sentences.append(f"{words['answer']}: {_names(self.answered_no)}.")
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


NAME: Column[BatchRow] = Column("name", "name", "adapter", align="left", priority=ALWAYS)
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
