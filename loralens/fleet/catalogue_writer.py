"""Writing the catalogue: an update changes a copy, which takes its place when the update ends.

So a reader finds the old catalogue or the new one, complete, whenever a writer is killed.
"""

import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from loralens.core.messages import warn
from loralens.errors import OptionError
from loralens.fleet.catalogue import (
    APPLICATION,
    CATALOGUE,
    FOLDER,
    TABLES,
    VERSION,
    FleetState,
    Signature,
    UnusableIndexError,
    catalogue_errors,
    connect,
    is_ours,
    name_of,
    read_state,
    stored_name,
    to_signature,
)
from loralens.formats.files.atomic import remove, reserve, was_killed
from loralens.formats.files.disk import disk_errors, sync, sync_folder

_COLUMNS = (
    "path", "name", "real", "bytes", "stamp", "status", "reason", "fix", "added", "indexed", "step", "format", "base",
    "signature", "modules", "zero_modules", "extras", "rank", "ranks", "scales", "parameters", "frobenius",
    "effective_rank", "norms", "fingerprint", "findings", "sketch",
)  # fmt: skip
# A file that changes keeps its number and the time when it was first seen. What was inferred of it is inferred anew.
_INSERT = (
    f"insert into files({', '.join(_COLUMNS)}) values({', '.join('?' * len(_COLUMNS))})"
    " on conflict(path) do update set "
    + ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS if name not in ("path", "name", "added"))
    + ", inferred = null"
)


@final
class CatalogueWriter:
    """The one writer of an index, from its making to `close`.

    Attributes
    ----------
    before : FleetState or None
        What there is; None if there is no catalogue that this version can go on with.
    was_killed : bool
        Whether the writer before was killed.

    Raises
    ------
    OptionError
        Another process writes the index, or its files are not those of an index.
    """

    def __init__(self, home: Path) -> None:
        self.home, self._file = home, home / CATALOGUE
        self._stack = ExitStack()
        # Everything is released after Ctrl-C too, before the error goes on.
        with ExitStack() as stack, catalogue_errors(home), disk_errors(home):
            self.was_killed = was_killed(self._file)
            self._part = stack.enter_context(reserve(self._file))
            self.before = self._read()
            # SQLite would undo what a journal of this name says, and delete a file that it names.
            for end in ("-journal", "-wal"):
                remove(self._part.with_name(f"{self._part.name}{end}"))
            if self.before:
                shutil.copyfile(self._file, self._part)
            self._rows = stack.enter_context(closing(connect(self._part, "mode=rw")))
            # The copy counts only once it is complete, and is then written to the disk.
            self._rows.execute("pragma journal_mode = memory")
            self._rows.execute("pragma synchronous = off")
            if not self.before:
                self._rows.execute(f"pragma application_id = {APPLICATION}")
                self._rows.execute(f"pragma user_version = {VERSION}")
                self._rows.executescript(TABLES)
            self._stack = stack.pop_all()

    def _read(self) -> FleetState | None:
        """What there is, if this version can go on with it."""
        if not os.path.lexists(self._file):
            return None
        try:
            state = read_state(self.home)
            # What answers look at only when they need it.
            with catalogue_errors(self.home):
                modules = {digest: len(to_signature(text).keys) for digest, text in state.signatures.items()}
                if any(modules.get(member.signature) != member.modules for member in state.members):
                    raise ValueError("signatures")
        except UnusableIndexError as error:
            # Elsewhere a file of this name may be the database of another program.
            if not (self.home.name == FOLDER or is_ours(self._file)):
                what = f"{self._file}: is not an index of loralens that could be made anew"
                raise OptionError(what, fix="choose another place for the index (-o), or remove this file") from error
            warn(f"{error.what}; it is made anew, and when each file was first indexed is lost")
            return None
        return state

    def close(self) -> None:
        """Let the copy take the place of the catalogue if it has changed, and let other processes write."""
        with self._stack, catalogue_errors(self.home), disk_errors(self.home):
            if not self.before or self._rows.total_changes:
                self._rows.close()
                sync(self._part)
                self._part.replace(self._file)
                sync_folder(self.home)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        connection = self._rows
        with catalogue_errors(self.home):
            connection.execute("begin")
            try:
                yield connection
                connection.execute("commit")
            except BaseException:
                # Where the disk is full, SQLite has ended the transaction itself.
                if connection.in_transaction:
                    connection.execute("rollback")
                raise

    def begin(self, root: Path, reading: str) -> None:
        """Store the folder of the adapters, and how they are read."""
        home = Path(os.path.realpath(self.home))
        inside = root == home or root in home.parents
        # A folder that contains the index is stored relative to it, so that both can be moved together.
        text = stored_name(os.path.relpath(root, home) if inside else str(root))
        state = {"root": text, "reading": reading}
        # An update that changes nothing writes nothing.
        if dict(self._rows.execute("select key, value from state")) != state:
            with self._transaction() as connection:
                connection.executemany("insert or replace into state values(?, ?)", list(state.items()))

    def store(self, rows: Sequence[Mapping[str, Any]], signatures: Mapping[str, str]) -> None:
        """Write rows of files."""
        # The time is written as the functions of SQLite write it, so that both can be compared.
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
        values = []
        for row in rows:
            path = stored_name(row["path"])
            complete = {**row, "path": path, "name": path, "added": now, "indexed": now}
            values.append([complete.get(column) for column in _COLUMNS])
        with self._transaction() as connection:
            connection.executemany("insert or ignore into signatures values(?, ?)", list(signatures.items()))
            connection.executemany(_INSERT, values)

    def remove(self, paths: Iterable[str]) -> None:
        """Remove files."""
        with self._transaction() as connection:
            connection.executemany("delete from files where path = ?", [[stored_name(path)] for path in paths])

    def _change(self, column: str, key: str, changed: Iterable[tuple[Any, Any]]) -> None:
        """Give the rows with this value of ``key`` another value in a column; pairs of new value and key."""
        with self._transaction() as connection:
            connection.executemany(f"update files set {column} = ? where {key} = ?", changed)  # noqa: S608

    def identify(self, real: Mapping[str, str]) -> None:
        """Path → identity of files that were moved or copied together with the index."""
        self._change("real", "path", [(identity, stored_name(path)) for path, identity in real.items()])

    def names(self) -> dict[str, str]:
        """Path → name of the files that people see: adapters, and what cannot be read."""
        rows = self._rows.execute("select path, name from files where status != 'other'")
        return {name_of(path): name_of(name) for path, name in rows}

    def rename(self, names: Mapping[str, str]) -> None:
        """Path → the name that people see, where it has changed."""
        self._change("name", "path", [(stored_name(name), stored_name(path)) for path, name in names.items()])

    def bases(self) -> tuple[dict[str, Signature], dict[str, Counter[str]]]:
        """The signatures in use, and how many members with each name which base; unused ones are removed."""
        with self._transaction() as connection:
            connection.execute("delete from signatures where signature not in (select signature from adapters)")
        rows = self._rows.execute("select signature, modules from signatures")
        signatures = {digest: to_signature(text) for digest, text in rows}
        named: dict[str, Counter[str]] = {digest: Counter() for digest in signatures}
        query = "select signature, base, count(*) from files where base is not null group by signature, base"
        for digest, base, count in self._rows.execute(query):
            named[digest][base] = count
        return signatures, named

    def infer(self, bases: Mapping[str, str]) -> None:
        """Store the base that each signature shows."""
        stored = self._rows.execute("select distinct signature, inferred from adapters").fetchall()
        changed = [(bases.get(digest), digest) for digest, inferred in stored if bases.get(digest) != inferred]
        self._change("inferred", "signature", changed)
