"""Writing the catalogue: an update changes a copy, which takes its place when the update ends.

So a reader finds the old catalogue or the new one, complete, whenever a writer is killed. The copy of a killed writer
has what was committed, and the next update goes on with it.
"""

import json
import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from loralens.core.messages import warn
from loralens.core.stored import parse_json
from loralens.errors import LoraLensError, OptionError
from loralens.fleet.catalogue import (
    APPLICATION,
    CATALOGUE,
    FOLDER,
    PART,
    TABLES,
    UNREACHABLE,
    VERSION,
    CatalogueConnection,
    FleetState,
    Signature,
    UnusableIndexError,
    catalogue_errors,
    check_regular,
    connect,
    is_ours,
    name_of,
    read_state,
    stored_name,
    to_signature,
)
from loralens.formats.files.disk import Hold, disk_errors, sync_folder

LOG = f"{PART}-wal"  # what was committed to the copy and is not in it yet
# SQLite would look at these, and delete a file that a journal names. No writer makes them: it has the copy for itself,
# and keeps the index of its log in its memory.
NEVER_OURS = (f"{PART}-journal", f"{PART}-shm")
# The files of an index up to loralens 0.1.
OLD_FILES = (f"{CATALOGUE}-journal", "sketches.i8", "in-work.json", "in-work.json.new", "added.json", "added.json.new")
_COLUMNS = (
    "path", "name", "real", "bytes", "stamp", "status", "reason", "fix", "added", "indexed", "step", "format", "base",
    "signature", "modules", "zero_modules", "extras", "rank", "ranks", "scales", "parameters", "frobenius",
    "effective_rank", "norms", "fingerprint", "findings",
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
        What there is, without sketches; None if there is no catalogue that this version can go on with.
    was_killed : bool
        Whether the writer before was killed.
    is_writing : bool
        Whether there is a copy, as something has changed.

    Raises
    ------
    OptionError
        Another process writes the index, or its files are not those of an index.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        for name in (CATALOGUE, PART, LOG):
            check_regular(home / name)
        for name in NEVER_OURS:
            if os.path.lexists(home / name):
                what = f"{home / name}: no run of loralens has written this file"
                raise OptionError(what, fix=f"remove {home}, and index again")
        with disk_errors(home):
            home.mkdir(parents=True, exist_ok=True)
        self._hold = Hold()
        self._hold.take(home)
        # The catalogue itself is only read. The copy is made when something is written.
        self._connection: CatalogueConnection | None = None
        self.is_writing = False
        try:
            self.was_killed = self._take_over()
            self.before = self._read()
        except BaseException:
            # The hold is released after Ctrl-C too, before the error goes on.
            self._hold.release()
            raise

    def _take_over(self) -> bool:
        """Let the copy of a killed writer take its place, if it is sound."""
        part = self.home / PART
        if not part.exists():
            return False
        # What has a second name would change under it, too.
        if all(file.stat().st_nlink == 1 for file in (part, self.home / LOG) if file.exists()):
            with suppress(LoraLensError, sqlite3.Error):
                with closing(connect(part, "mode=rw")) as connection:
                    _end_log(connection)
                read_state(self.home, name=PART, check=True, with_sketches=False)
                part.replace(self.home / CATALOGUE)
                return True
        self._remove_part()
        return True

    def _remove_part(self) -> None:
        with disk_errors(self.home):
            for name in (PART, LOG):
                (self.home / name).unlink(missing_ok=True)

    def _read(self) -> FleetState | None:
        """What there is, if this version can go on with it."""
        file = self.home / CATALOGUE
        if not os.path.lexists(file):
            return None
        try:
            return read_state(self.home, check=True, with_sketches=False)
        except UnusableIndexError as error:
            # Elsewhere a file of this name may be the database of another program.
            if not (self.home.name == FOLDER or is_ours(file) or (self.home / OLD_FILES[1]).exists()):
                what = f"{file}: is not an index of loralens that could be made anew"
                raise OptionError(what, fix="choose another place for the index (-o), or remove this file") from error
            warn(f"{error.what}; it is made anew, and when each file was first indexed is lost")
            return None

    def close(self, *, publish: bool = True) -> None:
        """Let the copy take the place of the catalogue, and other processes write; ``publish`` as after a kill."""
        try:
            if self._connection and self.is_writing and publish:
                with catalogue_errors(self.home), disk_errors(self.home):
                    _end_log(self._connection)
                    self._connection.close()
                    (self.home / PART).replace(self.home / CATALOGUE)
                    sync_folder(self.home)
                    for name in OLD_FILES:
                        with suppress(OSError):
                            (self.home / name).unlink(missing_ok=True)
        finally:
            if self._connection:
                self._connection.close()
            self._hold.release()

    @property
    def _rows(self) -> CatalogueConnection:
        """The connection that answers what the index has now."""
        if self._connection is None:
            file = self.home / CATALOGUE
            self._connection = connect(file, "mode=ro&immutable=1") if self.before else self._copy()
        return self._connection

    def _copy(self) -> CatalogueConnection:
        """A copy of the catalogue, or an empty one, and a connection that writes to it."""
        self._remove_part()
        part = self.home / PART
        if self.before:
            with disk_errors(part):
                shutil.copyfile(self.home / CATALOGUE, part)
        with catalogue_errors(self.home):
            connection = connect(part, "mode=rwc")
            # Nobody else opens the copy, so the index of the log can be in memory. A disk of several machines has none
            # that processes could share.
            connection.execute("pragma locking_mode = exclusive")
            connection.execute("pragma journal_mode = memory")  # of the change of the mode itself
            connection.execute("pragma journal_mode = wal")
            connection.execute("pragma synchronous = normal")
            if not self.before:
                connection.execute(f"pragma application_id = {APPLICATION}")
                connection.execute(f"pragma user_version = {VERSION}")
                connection.executescript(f"begin; {TABLES} commit;")
        self.is_writing = True
        return connection

    @contextmanager
    def _transaction(self) -> Iterator[CatalogueConnection]:
        if not self.is_writing:
            if self._connection:
                self._connection.close()
            self._connection = self._copy()
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
        if not self.before or dict(self._rows.execute("select key, value from state")) != state:
            with self._transaction() as connection:
                connection.executemany("insert or replace into state values(?, ?)", list(state.items()))

    def store(
        self, rows: Sequence[Mapping[str, Any]], sketches: Sequence[bytes], signatures: Mapping[str, str]
    ) -> None:
        """Write rows, and for each its sketch, which is empty if the file is no adapter."""
        # The time is written as the functions of SQLite write it, so that both can be compared.
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
        paths = [stored_name(row["path"]) for row in rows]
        values = []
        for row, path in zip(rows, paths, strict=True):
            complete = {**row, "path": path, "name": path, "added": now, "indexed": now}
            values.append([complete.get(column) for column in _COLUMNS])
        with self._transaction() as connection:
            connection.executemany("insert or ignore into signatures values(?, ?)", list(signatures.items()))
            connection.executemany(_INSERT, values)
            connection.executemany(_FORGET, [[path] for path in paths])
            connection.executemany(
                "insert into sketches select number, ? from files where path = ?",
                [(sketch, path) for sketch, path in zip(sketches, paths, strict=True) if sketch],
            )

    def remove(self, paths: Iterable[str]) -> None:
        """Remove files."""
        if stored := [[stored_name(path)] for path in paths]:
            with self._transaction() as connection:
                connection.executemany(_FORGET, stored)
                connection.executemany("delete from files where path = ?", stored)

    def _change(self, column: str, key: str, changed: Iterable[tuple[Any, Any]]) -> None:
        """Give the rows with this value of ``key`` another value in a column; pairs of new value and key."""
        if pairs := list(changed):
            with self._transaction() as connection:
                connection.executemany(f"update files set {column} = ? where {key} = ?", pairs)  # noqa: S608

    def identify(self, real: Mapping[str, str]) -> None:
        """Path → identity of files that were moved or copied together with the index."""
        self._change("real", "path", ((identity, stored_name(path)) for path, identity in real.items()))

    def mark_unreachable(self, paths: Collection[str]) -> None:
        """Give these adapters the finding that they could not be reached, and take it from all others."""
        changed = []
        for path, text in self._rows.execute("select path, findings from files where status = 'adapter'"):
            if name_of(path) in paths or UNREACHABLE in text:
                others = [code for code in parse_json(text) if code != UNREACHABLE]
                findings = json.dumps([UNREACHABLE] * (name_of(path) in paths) + others)
                if findings != text:
                    changed.append((findings, path))
        self._change("findings", "path", changed)

    def names(self) -> dict[str, str]:
        """Path → name of the files that people see: adapters, and what cannot be read."""
        rows = self._rows.execute("select path, name from files where status != 'other'")
        return {name_of(path): name_of(name) for path, name in rows}

    def rename(self, names: Mapping[str, str]) -> None:
        """Path → the name that people see, where it has changed."""
        self._change("name", "path", ((stored_name(name), stored_name(path)) for path, name in names.items()))

    def forget_signatures(self) -> None:
        """Remove the signatures that no file has any more."""
        unused = "from signatures where signature not in (select signature from files where signature is not null)"
        if self._rows.execute(f"select exists (select * {unused})").fetchone()[0]:
            with self._transaction() as connection:
                connection.execute(f"delete {unused}")

    def bases(self) -> tuple[dict[str, Signature], dict[str, Counter[str]]]:
        """The signatures in use, and how many members with each name which base."""
        rows = self._rows.execute("select signature, modules from signatures")
        signatures = {digest: to_signature(text) for digest, text in rows}
        named: dict[str, Counter[str]] = {digest: Counter() for digest in signatures}
        query = "select signature, base, count(*) from files where base is not null group by signature, base"
        for digest, base, count in self._rows.execute(query):
            named[digest][base] = count
        return signatures, named

    def infer(self, bases: Mapping[str, str]) -> None:
        """Store the base that each signature shows."""
        query = "select distinct signature, inferred from files where signature is not null"
        stored = self._rows.execute(query).fetchall()
        changed = {digest: bases.get(digest) for digest, inferred in stored if bases.get(digest) != inferred}
        self._change("inferred", "signature", ((base, digest) for digest, base in changed.items()))


_FORGET = "delete from sketches where number = (select number from files where path = ?)"


def _end_log(connection: sqlite3.Connection) -> None:
    """Write what the log has into the file, wait for the disk, and leave a file that stands alone."""
    connection.execute("pragma locking_mode = exclusive")
    if connection.execute("pragma journal_mode = delete").fetchone()[0] != "delete":
        raise sqlite3.OperationalError("the log cannot be ended")
