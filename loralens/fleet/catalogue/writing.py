"""Writing the catalogue: rows and slots in such an order that every commit is complete."""

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from loralens.core.stored import parse_json
from loralens.errors import OptionError
from loralens.fleet.catalogue.dates import forget_dates, kept_dates
from loralens.fleet.catalogue.members import UNREACHABLE, Signature
from loralens.fleet.catalogue.reading import name_of, read_root, stored_name, to_signature
from loralens.fleet.catalogue.schema import (
    CATALOGUE,
    IN_WORK,
    JOURNAL,
    NEXT_IN_WORK,
    SKETCHES,
    catalogue_errors,
    check_files,
    open_to_write,
    read_small,
)
from loralens.fleet.catalogue.slots import SlotWriter, checksum, damaged_slots, read_slots
from loralens.formats.files.disk import Hold, disk_errors, replace_text, sync_folder

_COLUMNS = (
    "path", "name", "real", "bytes", "stamp", "status", "reason", "fix", "added", "indexed", "slot", "checksum",
    "header", "step", "format", "base", "signature", "modules", "zero_modules", "extras", "rank", "ranks", "scales",
    "parameters", "frobenius", "effective_rank", "norms", "fingerprint", "findings",
)  # fmt: skip
# A file that changes keeps its number and the time when it was first seen. What was inferred of it is inferred anew.
_KEPT = ("path", "name", "added")
_INSERT = (
    f"insert into files({', '.join(_COLUMNS)}) values({', '.join('?' * len(_COLUMNS))})"
    " on conflict(path) do update set "
    + ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS if name not in _KEPT)
    + ", inferred = null"
)


@final
class CatalogueWriter:
    """The one writer of an index, from its making to `close`.

    A row names a slot and its checksum. New content always goes into a slot that no committed row names, and is on the
    disk before the row is committed. So a reader finds the old or the new content under every row, whenever the writer
    is killed.

    Raises
    ------
    OptionError
        Another process writes the index.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        check_files(home)
        for name in (CATALOGUE, SKETCHES):  # the files that are written in place
            if (home / name).exists() and (home / name).stat().st_nlink > 1:
                what = f"{home / name}: has a second name, under which an update would change it, too"
                raise OptionError(what, fix=f"copy {home} to another place, and let the copy take its place")
        # An index that is made anew keeps the dates of the old one.
        self._dates = kept_dates(home)
        with disk_errors(home):
            home.mkdir(parents=True, exist_ok=True)
        self._hold = Hold()
        self._hold.take(home)
        try:
            self._connection = open_to_write(home)
            with catalogue_errors(home):
                self._slots = SlotWriter(home, self._used_slots())
        except BaseException:
            # The hold is released after Ctrl-C too, before the error goes on.
            self._hold.release()
            raise

    def close(self) -> None:
        """Let other processes write."""
        self._slots.close()
        self._connection.close()
        self._hold.release()

    def _used_slots(self) -> list[int]:
        return [row[0] for row in self._connection.execute("select slot from files where slot is not null")]

    def root(self) -> Path | None:
        """The folder of the adapters; None in a new index."""
        return read_root(self._connection, self.home)

    def setting(self, key: str) -> str | None:
        """A value that `begin` has stored."""
        value = self._value(key)
        return None if value is None else str(value)

    def _value(self, key: str) -> object:
        row = self._connection.execute("select value from state where key = ?", [key]).fetchone()
        return row[0] if row else None

    def begin(self, root: Path, settings: Mapping[str, str]) -> None:
        """Store the folder of the adapters, and settings."""
        home = Path(os.path.realpath(self.home))
        inside = root == home or root in home.parents
        # A folder that contains the index is stored relative to it, so that both can be moved together.
        text = stored_name(os.path.relpath(root, home) if inside else str(root))
        state = {"root": text, **settings}
        # An update that changes nothing writes nothing.
        if any(self._value(key) != value for key, value in state.items()):
            with self._transaction():
                for key, value in state.items():
                    self._connection.execute("insert or replace into state values(?, ?)", [key, value])

    def indexed_files(self) -> dict[str, tuple[str, str]]:
        """Path → stamp and identity of every file; the stamp is empty where the slot is damaged."""
        rows = self._connection.execute("select path, stamp, real, slot, checksum from files").fetchall()
        checksums = {slot: expected for *_, slot, expected in rows if slot is not None}
        damaged = set(damaged_slots(read_slots(self.home), checksums))
        return {name_of(path): ("" if slot in damaged else stamp, real) for path, stamp, real, slot, _ in rows}

    def shown_paths(self) -> list[str]:
        """The paths of the files that people see: adapters, and what cannot be read."""
        return [name_of(row[0]) for row in self._connection.execute("select path from files where status != 'other'")]

    def adapters(self) -> list[str]:
        """The paths of the adapters."""
        return [name_of(row[0]) for row in self._connection.execute("select path from files where status = 'adapter'")]

    def mark_unreachable(self, paths: Collection[str]) -> None:
        """Give these adapters the finding that they could not be reached, and take it from all others."""
        query = "select path, findings from files where status = 'adapter' and"
        rows = dict(self._connection.execute(f"{query} findings like ?", [f'%"{UNREACHABLE}"%']))
        for path in paths:
            rows |= dict(self._connection.execute(f"{query} path = ?", [stored_name(path)]))
        changed = []
        for path, text in rows.items():
            others = [code for code in parse_json(text) if code != UNREACHABLE]
            findings = json.dumps([UNREACHABLE] * (name_of(path) in paths) + others)
            if findings != text:
                changed.append((findings, path))
        if changed:
            with self._transaction():
                self._connection.executemany("update files set findings = ? where path = ?", changed)

    def identify(self, real: Mapping[str, str]) -> None:
        """Path → identity of files that were moved or copied together with the index."""
        if real:
            with self._transaction():
                changed = [(identity, stored_name(path)) for path, identity in real.items()]
                self._connection.executemany("update files set real = ? where path = ?", changed)

    def remove(self, paths: Iterable[str]) -> None:
        """Remove files, and free their slots."""
        stored = [[stored_name(path)] for path in paths]
        if not stored:
            return
        before = set(self._used_slots())
        with self._transaction():
            self._connection.executemany("delete from files where path = ?", stored)
        self._slots.free(before - set(self._used_slots()))

    def store(
        self, rows: Sequence[Mapping[str, Any]], contents: Sequence[bytes], signatures: Mapping[str, str]
    ) -> None:
        """Write rows, and for each its slot; an empty content means that it has none."""
        slots = [self._slots.take() if content else None for content in contents]
        filled = {slot: content for slot, content in zip(slots, contents, strict=True) if slot is not None}
        if filled:
            self._slots.write(filled)
        # The time is written as the functions of SQLite write it, so that both can be compared.
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
        values = []
        for row, slot, content in zip(rows, slots, contents, strict=True):
            path = stored_name(row["path"])
            added = self._dates.get(row["path"], now)
            places = {"path": path, "name": path, "added": added, "indexed": now, "slot": slot}
            sums = {"checksum": checksum(content) if content else None}
            complete = {"reason": "", "fix": "", "header": "", **row, **places, **sums}
            values.append([complete.get(column) for column in _COLUMNS])
        old = self._slots_of([row["path"] for row in rows])
        with self._transaction():
            self._connection.executemany("insert or ignore into signatures values(?, ?)", list(signatures.items()))
            self._connection.executemany(_INSERT, values)
        self._slots.free(old)

    def _slots_of(self, paths: Iterable[str]) -> list[int]:
        """The slots that are free once these files have other ones."""
        query = "select slot from files where path = ? and slot is not null"
        return [row[0] for path in paths for row in self._connection.execute(query, [stored_name(path)])]

    def rename(self, names: Mapping[str, str]) -> None:
        """Path → the name that people see, where it differs from the stored one."""
        stored = {name_of(path): name for path, name in self._connection.execute("select path, name from files")}
        changed = [
            (stored_name(name), stored_name(path)) for path, name in names.items() if name_of(stored.get(path)) != name
        ]
        if changed:
            with self._transaction():
                self._connection.executemany("update files set name = ? where path = ?", changed)

    def forget_signatures(self) -> None:
        """Remove the signatures that no file has any more."""
        unused = "from signatures where signature not in (select signature from files where signature is not null)"
        if self._connection.execute(f"select exists (select * {unused})").fetchone()[0]:
            with self._transaction():
                self._connection.execute(f"delete {unused}")

    def bases(self) -> tuple[dict[str, Signature], dict[str, Counter[str]]]:
        """The signatures in use, and how many members with each name which base."""
        rows = self._connection.execute("select signature, modules from signatures")
        signatures = {digest: to_signature(text) for digest, text in rows}
        named: dict[str, Counter[str]] = {digest: Counter() for digest in signatures}
        query = "select signature, base, count(*) from files where base is not null group by signature, base"
        for digest, base, count in self._connection.execute(query):
            named[digest][base] = count
        return signatures, named

    def infer(self, bases: Mapping[str, str]) -> None:
        """Store the base that each signature shows, where it differs from the stored one."""
        query = "select distinct signature, inferred from files where signature is not null"
        stored = self._connection.execute(query).fetchall()
        changed = {digest: bases.get(digest) for digest, inferred in stored if bases.get(digest) != inferred}
        if changed:
            with self._transaction():
                for digest, base in changed.items():
                    self._connection.execute("update files set inferred = ? where signature = ?", [base, digest])

    def set_in_work(self, files: Sequence[str]) -> None:
        """Note the files that are in work: if the process is killed, one of them may be the cause."""
        # The list is replaced as a whole, since a file of the old one may kill the process at this moment.
        text = json.dumps([os.fsencode(file).hex() for file in files])
        replace_text(self.home / IN_WORK, text, part=self.home / NEXT_IN_WORK)

    def suspects(self) -> set[str]:
        """The files that were in work when the last writer was killed."""
        try:
            listed = read_small(self.home / IN_WORK)
            return {os.fsdecode(bytes.fromhex(file)) for file in listed}
        except (OSError, ValueError, TypeError):
            # The list is written without waiting for the disk, so it may hold anything after a power failure.
            return set()

    def complete(self) -> None:
        """Nothing is in work any more, and the index has everything."""
        self.finish()
        forget_dates(self.home)

    def expected(self) -> set[str]:
        """The paths of the adapters, and in an index that is being made anew those of the files that it had."""
        return {*self.adapters(), *self._dates}

    def finish(self) -> None:
        """Nothing is in work any more."""
        for name in (IN_WORK, NEXT_IN_WORK):
            (self.home / name).unlink(missing_ok=True)

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._connection, self.home)


@final
class _Transaction:
    """A transaction, which also counts the commits."""

    def __init__(self, connection: sqlite3.Connection, home: Path) -> None:
        self._connection, self._home = connection, home

    def __enter__(self) -> None:
        with catalogue_errors(self._home):
            self._connection.execute("begin immediate")

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with catalogue_errors(self._home):
            if kind is not None:
                # Where the disk is full, SQLite has ended the transaction itself.
                if self._connection.in_transaction:
                    self._connection.execute("rollback")
                if isinstance(error, sqlite3.Error):
                    raise error  # as one that says what to do
                return
            self._connection.execute(
                "insert into state values('commit', '1')"
                " on conflict(key) do update set value = cast(value as integer) + 1"
            )
            self._connection.execute("commit")


def remove_index(home: Path) -> None:
    """Remove a damaged index, so that it is made anew."""
    for name in (CATALOGUE, JOURNAL, SKETCHES, IN_WORK, NEXT_IN_WORK):
        (home / name).unlink(missing_ok=True)
    sync_folder(home)
