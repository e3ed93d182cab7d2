"""The catalogue of a fleet: one SQLite database with the rows of the files, their sketches, and names and shapes.

An index may come with a collection from anywhere. So SQLite gets only a regular file, and opens it as one that nothing
changes: it then looks at no journal or log beside it, and writes nothing. It answers no question before the tables are
known to be those of `TABLES`, and before SQLite has checked every page and every value against them. An update never
changes the file: it writes a copy, which takes its place as a whole.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from stat import S_ISREG
from time import monotonic
from typing import Any, NamedTuple, final
from urllib.parse import quote

import numpy as np

from loralens.core.messages import command_line
from loralens.core.stored import parse_json
from loralens.errors import FormatError, OptionError
from loralens.fleet.sketches import START_WIDTH, WIDTH, Sketches
from loralens.formats.files.json_text import finite_number

FOLDER = ".loralens-fleet"  # the folder of an index within the folder of the adapters
CATALOGUE = "catalogue.sqlite"
PART = f".{CATALOGUE}.part"  # the copy that an update changes, as `loralens.formats.files.atomic` names it
# In the header of every catalogue, so that others are told from it without a question. The version changes with the
# tables, with the sketches, and with what is measured.
APPLICATION, VERSION = 0x4C6F5241, 4
_HEADER = b"SQLite format 3\0"
LONGEST_PATH = 4096  # letters; Linux opens no file by a longer path
SECONDS = 30.0  # seconds that a reader may take; sorting all of 10,000 adapters takes a tenth of a second
SPEED = 5e7  # bytes of a catalogue that give a reader one second more
STEPS = 10_000  # instructions of SQLite between two looks at the clock, about a tenth of a millisecond
# Errors of the disk and not of the catalogue: it is full, or a file may not be written to, or cannot be opened.
_REFUSED = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
# Findings of the index itself, besides those of the readers.
ZERO_UPDATE = "zero-update"  # a module with ΔW = 0 whose scale is not 0
NON_FINITE = "non-finite"  # a head or another tensor that belongs to no pair holds NaN or Inf
OF_INDEX = frozenset({ZERO_UPDATE, NON_FINITE})
UNREACHABLE = "unreachable"  # the stamp of a file or folder that could not be reached at the last update

# The codes of a sketch are those of the update, followed by those of the first A. Paths and names are text, or bytes
# if they are not text. The sketch is the last column, since whoever asks for another one then reads no page of it.
TABLES = """
create table state(key text primary key, value any not null) strict, without rowid;
create table signatures(signature text primary key, modules text not null) strict, without rowid;
create table files(
    number integer primary key,
    path any not null unique,
    name any not null,
    real any not null,
    bytes integer not null,
    stamp text not null,
    status text not null,
    reason text not null default '',
    fix text not null default '',
    added text not null,
    indexed text not null,
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
    fingerprint text,
    findings text,
    norms text,
    sketch blob
) strict;
create view adapters as
    select number, path, name, real, bytes, added, indexed, format, base, inferred, signature, modules, zero_modules,
        extras, rank, ranks, scales, parameters, frobenius, effective_rank, norms, fingerprint, findings
    from files where status = 'adapter';
create view unreadable as select number, path, name, bytes, added, reason, fix from files where status = 'unreadable';
create view sketches as select number, sketch as codes from files where status = 'adapter';
"""
# What is true of every row that an update writes, besides its types. A CHECK would say it too, but SQLite does not look
# at those of a file that it opens for reading only.
_UNSOUND = f"""
select number from files where (
    min(bytes, ifnull(min(modules, zero_modules, extras, rank, parameters), 0)) >= 0
    and status in ('adapter', 'unreadable', 'other')
    and (status <> 'adapter' or length(sketch) = {WIDTH + START_WIDTH}
        and (format || signature || scales || fingerprint || findings || zero_modules || extras || rank || parameters)
            is not null
        and ifnull(min(step, frobenius, effective_rank), -1) >= 0 and max(step, frobenius, effective_rank) < 9e999
        and length(ifnull(base, '') || ifnull(inferred, '')) <= {LONGEST_PATH}
        and json_array_length(ranks) > 0
        and json_array_length(norms) = modules and norms not glob '?*[^]0-9e.,+-]*')
) is not true limit 1
"""  # noqa: S608 - numbers of ours


@final
@dataclass(frozen=True, slots=True)
class Member:
    """An adapter of a fleet, as the index has it.

    Attributes
    ----------
    number : int
        The number of its row in the catalogue. A file that changes keeps its number.
    name : str
        Its path relative to the root of the fleet; the folder if the folder holds no other adapter.
    path : Path
        The file.
    real : str
        Identifies the file itself: two paths that lead to one file, through links, have the same text.
    bytes : int
        Bytes on disk.
    format : str
        The dialect.
    base : str or None
        The base model that the file or its configuration names.
    inferred : str or None
        The base model that names and shapes show; None if they show none.
    signature : str
        The digest of the names and shapes of its modules; `Fleet.signature` has them.
    modules, zero_modules : int
        The number of modules, and of modules with ΔW = 0.
    extras : int
        Trained tensors that belong to no pair: heads, biases, magnitudes.
    ranks : tuple of int
        The nominal ranks that occur, increasing.
    scales : tuple of float
        The scales that occur, increasing.
    parameters : int
        The number of parameters in pairs.
    frobenius : float
        ‖ΔW‖_F of the whole update.
    effective_rank : float
        Mean over the modules that are not 0; 0 if all are.
    fingerprint : str
        See `loralens.core.fingerprint`.
    findings : tuple of str
        Codes of findings, the most serious first.
    added : str
        When the file was first indexed: UTC, as ``2026-01-31 12:00:00``.
    """

    number: int
    name: str
    path: Path
    real: str
    bytes: int
    format: str
    base: str | None
    inferred: str | None
    signature: str
    modules: int
    zero_modules: int
    extras: int
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    parameters: int
    frobenius: float
    effective_rank: float
    fingerprint: str
    findings: tuple[str, ...]
    added: str


@final
@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file that should be an adapter and cannot be read.

    Attributes
    ----------
    name, path, bytes
        As in `Member`.
    reason, fix : str
        Why it cannot be read, and what the user can do.
    """

    name: str
    path: Path
    bytes: int
    reason: str
    fix: str


@final
@dataclass(frozen=True, slots=True)
class Signature:
    """The names and shapes of the modules of one or more adapters.

    Attributes
    ----------
    keys : tuple of str
        The normalised names under which modules are compared, sorted; no model prefix.
    names : tuple of str
        The names in normal form with the prefix of the model, in the same order.
    shapes : tuple of pairs of int
        (out, in) of every module, in the same order.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]


@final
class UnusableIndexError(FormatError):
    """The catalogue is damaged, or is none that this version has written: an update makes it anew."""


class FileRow(NamedTuple):
    """Whether a file is an ``adapter``, ``unreadable`` or ``other``; its stamp and identity when it was measured."""

    status: str
    stamp: str
    real: str


@final
@dataclass(frozen=True, slots=True)
class FleetState:
    """What a catalogue holds.

    Attributes
    ----------
    root : Path
        The folder of the adapters.
    reading : str
        How the files were read; see `reading_setting`.
    members : tuple of Member
    unreadable, others : tuple of Unreadable
        The files that should be adapters, and those that hold tensors and no LoRA pairs, with the reason.
    sketches : Sketches
        Row i belongs to ``members[i]``.
    files : mapping of str to FileRow
        By their paths relative to the root.
    signatures : mapping of str to str
        Digest → names and shapes, for `to_signature`.
    """

    root: Path
    reading: str
    members: tuple[Member, ...]
    unreadable: tuple[Unreadable, ...]
    others: tuple[Unreadable, ...]
    sketches: Sketches
    files: Mapping[str, FileRow]
    signatures: Mapping[str, str]


def reading_setting(*, once: bool) -> str:
    """How files are read, as the catalogue states it; files that were read in another way are read again."""
    return f"once={once} torch={find_spec('torch') is not None}"


def find_home(path: Path) -> Path:
    """The folder of the index that a path means: the path itself, or `FOLDER` in it.

    In a folder that exists and is no index, a new index goes into `FOLDER`, so that no folder of the user is filled.
    """
    # A first update that was killed has left only a copy.
    if path.name == FOLDER or (path / CATALOGUE).exists() or (path / PART).exists():
        return path
    return path / FOLDER if path.is_dir() else path


def index_command(home: Path, root: Path | None = None, *, reading: str = "") -> str:
    """The command that updates an index, as a user types it; without ``root``, that of the index if it lies within."""
    known = root or (home.parent if home.name == FOLDER else None)
    within = home.name == FOLDER and (root is None or home.parent.resolve() == root.resolve())
    # With other options all files would be read again.
    options = ["--once"] if "once=True" in reading else []
    words = [str(known) if known else "DIR", *([] if within else ["-o", str(home)]), *options]
    return command_line("loralens", "fleet", "index", *words)


# Opening


@contextmanager
def open_to_read(home: Path) -> Iterator[sqlite3.Connection]:
    """A connection to the catalogue that cannot write, and sees the file as it is now until it is closed.

    Raises
    ------
    OptionError
        There is no index, its file is not a regular one, or its answers take too long.
    UnusableIndexError
        It is damaged, of another version, or has other tables or values than an update makes.
    """
    file = home / CATALOGUE
    if not os.path.lexists(file):
        raise OptionError(
            f"{home}: there is no index of a fleet",
            fix=f"make one: {index_command(home)}; --fleet names the index, or the folder that holds it",
        )
    # Opening a pipe would wait for a writer.
    if not S_ISREG(file.lstat().st_mode):
        what = f"{file}: is not a regular file, so no run of loralens has written it"
        raise OptionError(what, fix=f"remove {home}, and index again")
    with catalogue_errors(home):
        _check_header(file, home)
        with closing(connect(file, "mode=ro&immutable=1")) as connection:
            end = monotonic() + SECONDS + file.stat().st_size / SPEED
            connection.set_progress_handler(lambda: monotonic() > end, STEPS)
            try:
                # A view or a computed column in the place of a table may run without end.
                if frozenset(connection.execute(_SCHEMA)) != _own_tables():
                    raise UnusableIndexError(
                        f"{home}: the catalogue has other tables than this version of loralens makes",
                        fix=f"index again: {index_command(home)}",
                    )
                # This finds pages that are used twice, and would be read again and again.
                sound = connection.execute("pragma quick_check(1)").fetchone()[0] == "ok"
                # A condition that is NULL is not met either.
                if not sound or connection.execute(_UNSOUND).fetchone():
                    raise damaged(home)
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


def connect(file: Path, mode: str) -> sqlite3.Connection:
    """A connection of SQLite whose transactions are begun by `begin`, and not by Python."""
    address = f"file:{quote(os.fsencode(file.absolute()))}?{mode}"
    connection = sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False)
    # What SQLite advises for a file from elsewhere (https://sqlite.org/security.html).
    connection.execute("pragma trusted_schema = off")
    connection.execute("pragma cell_size_check = on")
    return connection


def is_ours(file: Path) -> bool:
    """Whether a file says in its header that it is a catalogue, of any version since the third."""
    with file.open("rb", buffering=0) as stream:
        start = stream.read(72)
    return start.startswith(_HEADER) and int.from_bytes(start[68:], "big") == APPLICATION


def _check_header(file: Path, home: Path) -> None:
    """Refuse a file that is no database, or one of another program or version, by its header."""
    try:
        with file.open("rb", buffering=0) as stream:
            start = stream.read(72)
    except OSError as error:
        fix = "give yourself the right to read it"
        raise OptionError(f"{file}: cannot be read: {error.strerror}", fix=fix) from error
    page, pages, version = (int.from_bytes(start[i:j], "big") for i, j in ((16, 18), (28, 32), (60, 64)))
    # A file that is longer than its pages may be one that no disk can hold a copy of.
    if not start.startswith(_HEADER) or page * pages != file.stat().st_size:
        raise damaged(home)
    if version != VERSION or not is_ours(file):
        raise UnusableIndexError(
            f"{home}: the index was made by another version of loralens, and has another form",
            fix=f"make it anew: {index_command(home)}",
        )


_SCHEMA = "select type, name, tbl_name, sql from sqlite_master"


@cache
def _own_tables() -> frozenset[tuple[Any, ...]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(TABLES)
        return frozenset(connection.execute(_SCHEMA))


def is_interrupted(error: Exception) -> bool:
    """Whether the handler of `open_to_read` has stopped SQLite: after too long a time, or for a signal."""
    return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_INTERRUPT


def damaged(home: Path, root: Path | None = None) -> UnusableIndexError:
    """The error for a catalogue that no update can have written."""
    return UnusableIndexError(f"{home}: the catalogue is damaged", fix=f"index again: {index_command(home, root)}")


@contextmanager
def catalogue_errors(home: Path, root: Path | None = None) -> Iterator[None]:
    """Turn an error of SQLite, and of values that no update has written, into one that says what to do."""
    try:
        yield
    # The text of an error may quote damaged bytes of the catalogue, which Python cannot decode.
    except (sqlite3.Error, UnicodeDecodeError) as error:
        # The low byte of a code of SQLite is its kind, and the others say more. A UnicodeDecodeError has no code.
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _REFUSED:
            fix = "check free space and permissions, and call again"
            raise FormatError(f"{home}: the disk refuses the catalogue: {error}", fix=fix) from error
        raise UnusableIndexError(
            f"{home}: the catalogue is damaged ({error})", fix=f"index again: {index_command(home)}"
        ) from error
    except (ValueError, TypeError, OverflowError) as error:
        raise damaged(home, root) from error


# Reading


def read_state(home: Path) -> FleetState:
    """Everything that questions need, of one state of the index."""
    with open_to_read(home) as connection:
        state = dict(connection.execute("select key, value from state"))
        with catalogue_errors(home):
            root = _root(home, state["root"]) if state.keys() == {"root", "reading"} else None
            if root is None or not isinstance(state["reading"], str):
                raise damaged(home)
        with catalogue_errors(home, root):
            rows = [
                dict(zip(_READ, row, strict=True))
                for row in connection.execute(f"select {', '.join(_READ)} from files")  # noqa: S608 - names of ours
            ]
            for row in rows:
                row["name"], row["path"], row["real"] = map(name_of, (row["name"], row["path"], row["real"]))
                # The path of another file could be listed as one that can be deleted.
                drive, path = os.path.splitdrive(row["path"].replace("\\", "/"))
                if drive or path.startswith("/") or os.pardir in path.split("/"):
                    raise damaged(home, root)
            rows.sort(key=lambda row: (row["name"], row["number"]))
            members = [row for row in rows if row["status"] == "adapter"]
            steps = np.array([row["step"] for row in members], np.float64)
            codes = np.empty((len(members), WIDTH + START_WIDTH), np.int8)
            place = {row["number"]: i for i, row in enumerate(members)}
            for number, sketch in connection.execute("select number, codes from sketches"):
                codes[place[number]] = np.frombuffer(sketch, np.int8)

            def others(status: str) -> tuple[Unreadable, ...]:
                keys = ("bytes", "reason", "fix")
                return tuple(
                    Unreadable(row["name"], root / row["path"], *(row[key] for key in keys))
                    for row in rows
                    if row["status"] == status
                )

            return FleetState(
                root,
                state["reading"],
                tuple(_member(row, root) for row in members),
                others("unreadable"),
                others("other"),
                Sketches(codes[:, :WIDTH], steps, codes[:, WIDTH:]),
                {row["path"]: FileRow(row["status"], row["stamp"], row["real"]) for row in rows},
                dict(connection.execute("select signature, modules from signatures")),
            )


def _root(home: Path, stored: object) -> Path | None:
    """The folder of the adapters, which is stored relative to the index that it contains; None if there is none."""
    root = Path(os.path.normpath(home / name_of(stored)))
    # An index from elsewhere could otherwise have the whole disk looked through.
    if is_whole_disk(root):
        return None
    # The methods of a Path raise an error for a name that is too long.
    return root if all(len(os.fsencode(part)) < 256 for part in root.parts) else None


def is_whole_disk(folder: Path) -> bool:
    """Whether a folder, or the target of a link, is that at the top of all others."""
    return os.path.realpath(folder) == os.sep


@lru_cache(maxsize=4096)
def to_signature(text: str) -> Signature:
    """A signature as the catalogue stores it: a list of key, name and shape of every module; or a ValueError."""
    modules = parse_json(text)
    for key, name, out, in_ in modules:
        if not (isinstance(key, str) and isinstance(name, str) and is_count(out) and is_count(in_)):
            raise ValueError("no signature")
    return Signature(
        tuple(key for key, *_ in modules),
        tuple(name for _, name, *_ in modules),
        tuple((out, in_) for *_, out, in_ in modules),
    )


def read_norms(home: Path, member: Member, signature: Signature) -> Mapping[str, float]:
    """Key → ‖ΔW‖_F of the modules of a member."""
    with open_to_read(home) as connection:
        row = connection.execute("select norms from adapters where number = ?", [member.number]).fetchone()
    if row is None:
        raise FormatError(f"{member.path}: is not in the index any more", fix="take the members of the fleet anew")
    with catalogue_errors(home):
        return dict(zip(signature.keys, map(float, parse_json(row[0])), strict=True))


def stored_name(name: str) -> str | bytes:
    """A path as the catalogue stores it: text, or the bytes of a path that is not text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name)
    return name


def name_of(stored: object) -> str:
    """A path or a name that the catalogue has stored; or a ValueError."""
    name = os.fsdecode(stored) if isinstance(stored, bytes) else stored
    if not isinstance(name, str) or "\0" in name or len(name) > LONGEST_PATH:
        raise ValueError("no name")
    return name


def _member(row: Mapping[str, Any], root: Path) -> Member:
    lists = {key: decode_list(row[key], is_valid) for key, is_valid in _LISTS.items()}
    return Member(**{key: row[key] for key in _MEMBER} | lists | {"path": root / row["path"]})


# Most adapters of a fleet have the same few lists.
@lru_cache(maxsize=256)
def decode_list(text: str, is_valid: Callable[[object], bool]) -> tuple[Any, ...]:
    """A list that is stored as JSON, or a ValueError."""
    decoded = parse_json(text)
    if not isinstance(decoded, list) or not all(map(is_valid, decoded)):
        raise ValueError("not such a list")
    return tuple(decoded)


def is_count(value: object) -> bool:
    """Whether it is a whole number that is not negative."""
    return type(value) is int and 0 <= value < 1 << 63


_LISTS: Mapping[str, Callable[[object], bool]] = {
    "ranks": is_count,
    "scales": lambda value: finite_number(value) is not None,
    "findings": lambda value: isinstance(value, str),
}
_MEMBER = (
    "number", "name", "real", "bytes", "format", "base", "inferred", "signature", "modules", "zero_modules", "extras",
    "parameters", "frobenius", "effective_rank", "fingerprint", "added",
)  # fmt: skip
_READ = (*_MEMBER, *_LISTS, "path", "status", "stamp", "reason", "fix", "step")
