"""The tables of the catalogue, and connections to it for the writer and for readers."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from loralens.core.messages import command_line
from loralens.errors import FormatError, OptionError

FOLDER = ".loralens-fleet"  # the folder of an index within the folder of the adapters
CATALOGUE = "catalogue.sqlite"
# Indexes of another version are made anew. It changes with the tables, with the sketches, and with what is measured.
VERSION = "2"
READING = ("allow_pickle", "once")  # the options with which files are read; the setting ``reading`` has both
WAIT = 60.0  # seconds for which a connection waits until another one has finished reading or writing
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
    options = [f"--{name.replace('_', '-')}" for name in READING if f"{name}=True" in settings]
    words = [str(known) if known else "DIR", *([] if within else ["-o", str(home)]), *options]
    return command_line("loralens", "fleet", "index", *words)


@contextmanager
def open_to_read(home: Path) -> Iterator[sqlite3.Connection]:
    """A connection to the catalogue that cannot write.

    Raises
    ------
    OptionError
        There is no index, or it is of another version.
    FormatError
        The catalogue is damaged.
    """
    file = home / CATALOGUE
    if not file.exists():
        raise OptionError(
            f"{home}: there is no index of a fleet",
            fix=f"make one: {index_command(home)}; --fleet names the index, or the folder that holds it",
        )
    with catalogue_errors(home):
        _finish_killed_write(file)
        with closing(_connect(file, "ro")) as connection:
            connection.execute("pragma query_only = on")
            check_version(connection, home)
            yield connection


def _finish_killed_write(file: Path) -> None:
    """Undo the transaction of a writer that was killed, which a connection that cannot write is unable to do."""
    # SQLite takes the journal for that of a killed writer only if no process holds its lock.
    if file.with_name(f"{file.name}-journal").exists():
        with closing(_connect(file, "rw")) as connection:
            connection.execute("select count(*) from state").fetchone()


def open_to_write(home: Path) -> sqlite3.Connection:
    """A connection that writes; the catalogue is made if it is missing."""
    with catalogue_errors(home):
        connection = _connect(home / CATALOGUE, "rwc")
        # A transaction is on the disk when it is committed. The journal is a file that readers on any disk can cope
        # with, where that of the mode WAL needs memory shared between processes.
        connection.execute("pragma journal_mode = delete")
        connection.execute("pragma synchronous = full")
        if not connection.execute("select count(*) from sqlite_master").fetchone()[0]:
            connection.executescript(f"begin; {TABLES} insert into state values('version', '{VERSION}'); commit;")
        check_version(connection, home)
        return connection


def _connect(file: Path, mode: str) -> sqlite3.Connection:
    # Transactions are begun by `begin`, and not by Python.
    address = f"file:{quote(str(file.absolute()))}?mode={mode}"
    connection = sqlite3.connect(address, uri=True, timeout=WAIT, isolation_level=None, check_same_thread=False)
    # An index may come with a collection from elsewhere, so its views and triggers run only functions without side
    # effects.
    connection.execute("pragma trusted_schema = off")
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
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _REFUSED:
            fix = "check free space and permissions, and call again"
            raise FormatError(f"{home}: the disk refuses the catalogue: {text}", fix=fix) from error
        raise FormatError(
            f"{home}: the catalogue is damaged ({text})", fix=f"index again: {index_command(home)}"
        ) from error
