"""The tables of the catalogue, and connections to it for the writer and for readers.

An index may come with a collection from anywhere. So SQLite opens only regular files that a run of loralens can have
written, and answers nothing before the tables are known to be ours.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from stat import S_ISREG
from time import monotonic
from typing import Any
from urllib.parse import quote

from loralens.core.messages import command_line
from loralens.core.stored import parse_json
from loralens.errors import FormatError, OptionError

FOLDER = ".loralens-fleet"  # the folder of an index within the folder of the adapters
CATALOGUE = "catalogue.sqlite"
JOURNAL = f"{CATALOGUE}-journal"  # the pages that a transaction changes, as they were; it stays if the writer is killed
SKETCHES = "sketches.i8"
# The files in work, in a file of its own: it is written often, and must survive the process but not the machine.
IN_WORK, NEXT_IN_WORK = "in-work.json", "in-work.json.new"
DATES, NEXT_DATES = "added.json", "added.json.new"
FILES = (CATALOGUE, JOURNAL, SKETCHES, IN_WORK, NEXT_IN_WORK, DATES, NEXT_DATES)
# SQLite writes to these even if it only reads. They belong to a mode in which loralens never works.
_NEVER_OURS = (f"{CATALOGUE}-wal", f"{CATALOGUE}-shm")
_HEADER = b"SQLite format 3\0"
_ROLLBACK = b"\1\1"  # bytes 18 and 19 of a database whose transactions have a journal, and no write-ahead log
# The end of a journal that names another file, the super-journal. SQLite deletes that file when it undoes the
# transaction (https://sqlite.org/fileformat2.html).
_SUPER_JOURNAL = bytes.fromhex("d9d505f920a163d7")
# Indexes of another version are made anew. It changes with the tables, with the sketches, and with what is measured.
VERSION = "2"
WAIT = 60.0  # seconds for which a connection waits until another one has finished reading or writing
POLL = 0.1  # seconds for which SQLite itself waits in a reader, where no signal is noticed
LONGEST_VALUE = 1_000_000_000  # bytes; SQLite itself has this limit
LONGEST_SIDE = 1 << 26  # bytes of a file beside the catalogue; the dates of 400,000 adapters take as many
# A sparse catalogue holds fewer bytes than its size. On a disk that compresses, it may hold so many times its blocks.
MOST_COMPRESSED = 64
SMALL = 1 << 24  # bytes of a catalogue whose blocks are not looked at
SECONDS = 30.0  # seconds that a reader may take; sorting all of 10,000 adapters takes a tenth of a second
STEPS = 10_000  # instructions of SQLite between two looks at the clock, about a tenth of a millisecond
# Errors of the disk and not of the catalogue: it is full, or a file may not be written to, or cannot be opened.
_REFUSED = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)

TABLES = """
create table state(key text primary key, value text not null) without rowid;
create table signatures(signature text primary key, modules text not null) without rowid;
create table files(
    number integer primary key,
    path text not null unique,
    name text not null,
    real text not null,
    bytes integer not null,
    stamp text not null,
    status text not null,
    reason text not null default '',
    fix text not null default '',
    header text not null default '',
    added text not null,
    indexed text not null,
    slot integer unique,
    checksum integer,
    step real,
    format text,
    base text,
    inferred text,
    signature text,
    modules integer,
    zero_modules integer,
    extras integer,
    rank integer,
    ranks text,
    scales text,
    parameters integer,
    frobenius real,
    effective_rank real,
    norms text,
    fingerprint text,
    findings text
);
create view adapters as
    select number, path, name, real, bytes, added, indexed, format, base, inferred, signature, modules, zero_modules,
        extras, rank, ranks, scales, parameters, frobenius, effective_rank, norms, fingerprint, findings
    from files where status = 'adapter';
create view unreadable as select number, path, name, bytes, added, reason, fix from files where status = 'unreadable';
"""


def reading_setting(*, once: bool) -> str:
    """How files are read, as the catalogue states it; files that were read in another way are read again."""
    return f"once={once} torch={find_spec('torch') is not None}"


def find_home(path: Path) -> Path:
    """The folder of the index that a path means: the path itself, or `FOLDER` in it.

    In a folder that exists and is no index, a new index goes into `FOLDER`, so that no folder of the user is filled.
    """
    if path.name == FOLDER or (path / CATALOGUE).exists():
        return path
    return path / FOLDER if path.is_dir() else path


def index_command(home: Path, root: Path | None = None, *, settings: str = "") -> str:
    """The command that updates an index, as a user types it.

    Parameters
    ----------
    home : Path
        The folder of the index.
    root : Path, optional
        The folder of the adapters; if it is not known, that of the index says it where it lies within.
    settings : str
        How the files were read, as the catalogue states it; with other options all would be read again.
    """
    known = root or (home.parent if home.name == FOLDER else None)
    within = home.name == FOLDER and (root is None or home.parent.resolve() == root.resolve())
    options = ["--once"] if "once=True" in settings else []
    words = [str(known) if known else "DIR", *([] if within else ["-o", str(home)]), *options]
    return command_line("loralens", "fleet", "index", *words)


def check_files(home: Path) -> None:
    """Refuse an index folder with something in it that no run of loralens has written.

    Links would let an update write to the files that they lead to. A pipe without a writer would be waited for, and a
    device has no end.

    Raises
    ------
    OptionError
    """
    fix = f"remove {home}, and index again"
    for name in (*FILES, *_NEVER_OURS):
        try:
            status = (home / name).lstat()
        except OSError:  # it is not there, or the folder may not be looked at, which the opening reports
            continue
        if name in _NEVER_OURS:
            raise OptionError(f"{home / name}: no run of loralens has written this file", fix=fix)
        if not S_ISREG(status.st_mode):
            raise OptionError(f"{home / name}: is not a regular file, so no run of loralens has written it", fix=fix)
        if name == JOURNAL and _last_bytes(home / name, len(_SUPER_JOURNAL)) == _SUPER_JOURNAL:
            raise OptionError(f"{home / name}: names another file, which SQLite would delete", fix=fix)


def _last_bytes(file: Path, count: int) -> bytes:
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(max(stream.seek(0, 2) - count, 0))
            return stream.read(count)
    except OSError:  # a writer has removed it since, or SQLite will not be able to read it either
        return b""


@contextmanager
def open_to_read(home: Path) -> Iterator[sqlite3.Connection]:
    """A connection to the catalogue that cannot write, in one transaction.

    Raises
    ------
    OptionError
        There is no index, it is of another version, holds files that loralens has not written, or its answers take too
        long.
    FormatError
        The catalogue is damaged, or its tables are not those that an update makes.
    """
    with open_unchecked(home) as connection:
        _check_tables(connection, home)
        check_version(connection, home)
        yield connection


@contextmanager
def open_unchecked(home: Path) -> Iterator[sqlite3.Connection]:
    """A connection as of `open_to_read`, to a catalogue whose tables may be any."""
    file = home / CATALOGUE
    check_files(home)
    if not file.exists():
        raise OptionError(
            f"{home}: there is no index of a fleet",
            fix=f"make one: {index_command(home)}; --fleet names the index, or the folder that holds it",
        )
    with catalogue_errors(home):
        _check_header(file)
        with closing(_connect(file, "ro", POLL)) as connection:
            connection.execute("pragma query_only = on")
            # No value is longer than the file that holds it.
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, min(_held_bytes(home), LONGEST_VALUE))
            end = monotonic() + SECONDS
            connection.set_progress_handler(lambda: monotonic() > end, STEPS)
            try:
                _begin(connection)
                yield connection
            except sqlite3.OperationalError as error:
                if not is_interrupted(error):
                    raise
                if monotonic() <= end:
                    # A signal has raised it within the handler, where Python drops it.
                    raise KeyboardInterrupt from None
                what = f"{home}: an answer of the catalogue takes longer than {SECONDS:g} s"
                raise OptionError(
                    what, fix=f"add a LIMIT if it is your SELECT; otherwise remove {home}, and index again"
                ) from error


def is_interrupted(error: Exception) -> bool:
    """Whether the handler of `open_to_read` has stopped SQLite: after too long a time, or for a signal."""
    return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_INTERRUPT


def _check_header(file: Path) -> None:
    """Refuse a database whose mode would let SQLite write also where it only reads."""
    try:
        with file.open("rb", buffering=0) as stream:
            start = stream.read(20)
    except OSError:  # SQLite says why
        return
    if not start.startswith(_HEADER) or start[18:] != _ROLLBACK:
        raise sqlite3.DatabaseError("it is not a database, or not in the mode that loralens uses")


def _begin(connection: sqlite3.Connection) -> None:
    """Begin to read; a writer that has just begun to commit is waited for, here and not within SQLite."""
    end = monotonic() + WAIT
    connection.execute("begin")
    while True:
        try:
            connection.execute("pragma user_version")  # which reads no table, and takes the lock
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or monotonic() > end:
                raise
        else:
            return


def _check_tables(connection: sqlite3.Connection, home: Path) -> None:
    """Refuse tables that an update does not make: a view or a computed column in their place may run without end."""
    if frozenset(read_rows(connection, home, _SCHEMA)) != _own_tables():
        raise FormatError(
            f"{home}: the catalogue has other tables than this version of loralens makes",
            fix=f"index again: {index_command(home)}",
        )


_SCHEMA = "select type, name, tbl_name, sql from sqlite_master"


@cache
def _own_tables() -> frozenset[tuple[Any, ...]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(TABLES)
        return frozenset(connection.execute(_SCHEMA))


def read_rows(
    connection: sqlite3.Connection, home: Path, sql: str, parameters: Sequence[object] = ()
) -> Iterator[tuple[Any, ...]]:
    """The rows of a query that repeats no value of the catalogue.

    Raises
    ------
    FormatError
        They have more bytes than the file, which happens if damaged or hostile pages are read again and again.
    """
    left = _held_bytes(home)
    for row in connection.execute(sql, parameters):
        left -= len(row) + sum(len(value) for value in row if isinstance(value, str | bytes))
        if left < 0:
            raise damaged(home)
        yield row


def _held_bytes(home: Path) -> int:
    """The bytes of the catalogue, which may be a sparse file of any size; a disk may hold it compressed."""
    status = (home / CATALOGUE).stat()
    return min(status.st_size, max(MOST_COMPRESSED * 512 * getattr(status, "st_blocks", status.st_size), SMALL))


def read_small(file: Path) -> Any:
    """The JSON of a file of an index beside the catalogue.

    Raises
    ------
    OSError, ValueError
        There is none, it is no JSON, or it is far longer than an update writes it.
    """
    if file.stat().st_size > LONGEST_SIDE:
        raise ValueError(f"longer than {LONGEST_SIDE} bytes")
    return parse_json(file.read_text(encoding="ascii"))


def damaged(home: Path, root: Path | None = None) -> FormatError:
    """The error for a catalogue that no update can have written."""
    return FormatError(f"{home}: the catalogue is damaged", fix=f"index again: {index_command(home, root)}")


def finish_killed_write(home: Path) -> None:
    """Undo the transaction of a writer that was killed, which a connection that cannot write is unable to do."""
    check_files(home)
    # SQLite takes the journal for that of a killed writer only if no process holds its lock.
    if (home / JOURNAL).exists():
        with catalogue_errors(home), closing(_connect(home / CATALOGUE, "rw", WAIT)) as connection:
            connection.execute("pragma user_version")


def open_to_write(home: Path) -> sqlite3.Connection:
    """A connection that writes; the catalogue is made if it is missing."""
    with catalogue_errors(home):
        connection = _connect(home / CATALOGUE, "rwc", WAIT)
        # A transaction is on the disk when it is committed. The journal is a file that readers on any disk can cope
        # with, where that of the mode WAL needs memory shared between processes.
        connection.execute("pragma journal_mode = delete")
        connection.execute("pragma synchronous = full")
        if not connection.execute("select count(*) from sqlite_master").fetchone()[0]:
            connection.executescript(f"begin; {TABLES} insert into state values('version', '{VERSION}'); commit;")
        _check_tables(connection, home)
        check_version(connection, home)
        return connection


def _connect(file: Path, mode: str, wait: float) -> sqlite3.Connection:
    # Transactions are begun by `begin`, and not by Python.
    address = f"file:{quote(str(file.absolute()))}?mode={mode}"
    connection = sqlite3.connect(address, uri=True, timeout=wait, isolation_level=None, check_same_thread=False)
    # What SQLite advises for a file from elsewhere (https://sqlite.org/security.html).
    connection.execute("pragma trusted_schema = off")
    connection.execute("pragma cell_size_check = on")
    return connection


def check_version(connection: sqlite3.Connection, home: Path) -> None:
    """Refuse a catalogue of another version."""
    row = connection.execute("select value from state where key = 'version'").fetchone()
    if row is None or row[0] != VERSION:
        raise OptionError(
            f"{home}: the index was made by another version of loralens", fix=f"index again: {index_command(home)}"
        )


@contextmanager
def catalogue_errors(home: Path) -> Iterator[None]:
    """Turn an error of SQLite into one that says what to do."""
    try:
        yield
    # The text of an error may quote damaged bytes of the catalogue, which Python cannot decode.
    except (sqlite3.Error, UnicodeDecodeError) as error:
        text = str(error)
        if "locked" in text or "busy" in text:
            fix = "wait for the end of the other process, and call again"
            raise OptionError(f"{home}: another process uses the catalogue", fix=fix) from error
        # The low byte of a code of SQLite is its kind, and the others say more. A UnicodeDecodeError has no code.
        code = getattr(error, "sqlite_errorcode", 0)
        if code == sqlite3.SQLITE_READONLY_ROLLBACK:
            what = f"{home}: a run that wrote the catalogue was killed, and its last change must be undone first"
            raise OptionError(what, fix=f"index again: {index_command(home)}") from error
        if code & 0xFF in _REFUSED:
            fix = "check free space and permissions, and call again"
            raise FormatError(f"{home}: the disk refuses the catalogue: {text}", fix=fix) from error
        raise FormatError(
            f"{home}: the catalogue is damaged ({text})", fix=f"index again: {index_command(home)}"
        ) from error
