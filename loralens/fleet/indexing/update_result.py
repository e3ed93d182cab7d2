"""`UpdateResult`: what an update of an index has found."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loralens.fleet.catalogue.members import Unreadable
from loralens.tables.numbers import count
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table

MOST_CHANGES = 20  # changes that a terminal shows
Kind = Literal["new", "changed", "gone"]


@dataclass(frozen=True, slots=True)
class FileChange:
    """A file that is new, changed or gone since the last update; ``path`` is relative to the root."""

    path: str
    change: Kind


@dataclass(frozen=True, slots=True)
class UpdateResult(Tabular):
    """An index after its update; the result is a sequence of the changes.

    Attributes
    ----------
    home, root : Path
        The folder of the index, and that of the adapters.
    adapters : int
        How many adapters it has now.
    no_adapters : int
        Files that hold tensors and no LoRA pairs.
    changes : sequence of FileChange
        The files that were measured or forgotten.
    unreadable : sequence of Unreadable
        All files that should be adapters and cannot be read, and folders that cannot be listed.
    unreachable : sequence of Path
        Adapters that could not be reached this time, and are kept as they were.
    first : bool
        Whether there was no index before.
    """

    home: Path
    root: Path
    adapters: int
    no_adapters: int
    changes: Sequence[FileChange]
    unreadable: Sequence[Unreadable]
    unreachable: Sequence[Path]
    first: bool

    def __len__(self) -> int:
        return len(self.changes)

    def __getitem__(self, index: int) -> FileChange:
        return self.changes[index]

    def counts(self) -> dict[str, int]:
        """How many files are new, changed and gone."""
        kinds = Counter(change.change for change in self.changes)
        return {kind: kinds[kind] for kind in ("new", "changed", "gone")}

    def conclusion(self) -> list[str]:
        """How many adapters the index has, and what has changed."""
        counts = self.counts()
        if self.first:
            news = ""
        elif self.changes:
            news = " " + ", ".join(f"{number} {kind}" for kind, number in counts.items() if number) + "."
        else:
            news = " Nothing has changed."
        broken = f" {count(len(self.unreadable), 'file')} cannot be read." if self.unreadable else ""
        sentences = [f"{self.root}: {count(self.adapters, 'adapter')} in the index {self.home}.{news}{broken}"]
        if self.unreachable:
            are = "could not be reached, and is" if len(self.unreachable) == 1 else "could not be reached, and are"
            sentences.append(f"{count(len(self.unreachable), 'adapter')} {are} kept as before.")
        return sentences

    def tables(self) -> list[Table[Any]]:
        """The changes, unless everything is new, and the files that cannot be read."""
        changes = [] if self.first else self.changes
        return [
            Table("changes", CHANGES, changes, most=MOST_CHANGES),
            Table("cannot be read", UNREADABLE, self.unreadable, most=MOST_CHANGES),
        ]

    def listing(self) -> list[Table[FileChange]]:
        """The changes."""
        return [Table("changes", CHANGES, self.changes)]

    def record(self) -> dict[str, Any]:
        """The whole result as a JSON object."""
        return {
            "root": str(self.root),
            "home": str(self.home),
            "adapters": self.adapters,
            "no_adapters": self.no_adapters,
            **self.counts(),
            "changes": self.listing()[0].records(),
            "unreadable": Table("unreadable", UNREADABLE, self.unreadable).records(),
            "unreachable": [str(path) for path in self.unreachable],
        }


CHANGES: tuple[Column[FileChange], ...] = (
    Column("path", lambda row: row.path, "file", align="left", priority=ALWAYS, distinct=True),
    Column("change", lambda row: row.change, "change", align="left", priority=ALWAYS),
)
UNREADABLE: tuple[Column[Unreadable], ...] = (
    Column("name", lambda row: row.name, "file", align="left", priority=ALWAYS, distinct=True),
    Column("path", lambda row: str(row.path)),
    Column("bytes", lambda row: row.bytes),
    Column("reason", lambda row: row.reason, "reason", align="left", priority=ALWAYS, sentence=True),
    Column("fix", lambda row: row.fix),
)
