"""The catalogue of a fleet: one SQLite database with the rows of the files, their sketches, and names and shapes.

An index may come with a collection from anywhere. So SQLite gets only a regular file, and opens it as one that nothing
changes: it then looks at no journal or log beside it, and writes nothing. It answers no question before the tables are
known to be those of `TABLES`. An update never changes the file: it writes a copy, which takes its place as a whole.
"""

import errno
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from stat import S_ISREG
from sys import float_info
from time import monotonic
from typing import Any, NamedTuple, final
from urllib.parse import quote

import numpy as np

from loralens.core.messages import command_line
from loralens.core.stored import parse_json
from loralens.errors import FormatError, OptionError
from loralens.fleet.sketches import START_WIDTH, WIDTH, Sketches
from loralens.formats.files.json_text import finite_number, plain_text

FOLDER = ".loralens-fleet"  # the folder of an index within the folder of the adapters
CATALOGUE = "catalogue.sqlite"
PART = f"{CATALOGUE}.part"  # the copy that an update changes
# In the header of every catalogue, so that others are told from it without a question. The version changes with the
# tables, with the sketches, and with what is measured.
APPLICATION, VERSION = 0x4C6F5241, 3
_HEADER = b"SQLite format 3\0"
LONGEST_VALUE = 1_000_000_000  # bytes; SQLite itself has this limit
LONGEST_PATH = 4096  # letters; Linux opens no file by a longer path
# A sparse catalogue holds fewer bytes than its size. On a disk that compresses, it may hold so many times its blocks.
MOST_COMPRESSED = 64
SMALL = 1 << 24  # bytes of a catalogue whose blocks are not looked at
SECONDS = 30.0  # seconds that a reader may take; sorting all of 10,000 adapters takes a tenth of a second
SPEED = 5e7  # bytes of a catalogue that give a reader one second more
STEPS = 10_000  # instructions of SQLite between two looks at the clock, about a tenth of a millisecond
# Errors of the disk and not of the catalogue: it is full, or a file may not be written to, or cannot be opened.
_REFUSED = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
# Findings of the index itself, besides those of the readers.
ZERO_UPDATE = "zero-update"  # a module with ΔW = 0 whose scale is not 0
NON_FINITE = "non-finite"  # a head or another tensor that belongs to no pair holds NaN or Inf
UNREACHABLE = "unreachable"  # neither the file nor its folder could be reached at the last update
OF_INDEX = frozenset({ZERO_UPDATE, NON_FINITE, UNREACHABLE})

# The codes of a sketch are those of the update, and behind them those of the start.
TABLES = """
create table state(key text primary key, value text not null) without rowid;
create table signatures(signature text primary key, modules text not null) without rowid;
create table sketches(number integer primary key, codes blob not null);
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


class CatalogueConnection(sqlite3.Connection):
    """A connection to the catalogue of ``home``, of which the disk holds ``held`` bytes."""

    home: Path
    held: int

    def read(self, sql: str) -> Iterator[tuple[Any, ...]]:
        """The rows of a query that repeats no value of the catalogue.

        Rows with more bytes than the file are refused: damaged or hostile pages are read again and again.
        """
        left = self.held
        for row in self.execute(sql):
            left -= len(row) + sum(len(value) for value in row if isinstance(value, str | bytes))
            if left < 0:
                raise damaged(self.home)
            yield row

    def reading(self) -> str:
        """How the files were read."""
        row = self.execute("select value from state where key = 'reading'").fetchone()
        if row is None or not is_text(row[0]):
            raise damaged(self.home)
        return str(row[0])

    def root(self) -> Path:
        """The folder of the adapters."""
        row = self.execute("select value from state where key = 'root'").fetchone()
        if row is None or not is_name(row[0]):
            raise damaged(self.home)
        # A root that contains the index is stored relative to it, so that both can be moved together.
        root = Path(os.path.normpath(self.home / name_of(row[0])))
        # An index from elsewhere could otherwise have the whole disk looked through.
        if is_whole_disk(root):
            raise damaged(self.home)
        try:
            root.lstat()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # which the methods of a Path answer by an error
                raise damaged(self.home) from error
        return root


@contextmanager
def open_to_read(home: Path, name: str = CATALOGUE) -> Iterator[CatalogueConnection]:
    """A connection to the catalogue that cannot write, and sees the file as it is now until it is closed.

    Raises
    ------
    OptionError
        There is no index, its file is not a regular one, or its answers take too long.
    UnusableIndexError
        It is damaged, of another version, or has other tables than an update makes.
    """
    file = home / name
    check_regular(file)
    if not file.exists():
        raise OptionError(
            f"{home}: there is no index of a fleet",
            fix=f"make one: {index_command(home)}; --fleet names the index, or the folder that holds it",
        )
    with catalogue_errors(home):
        _check_header(file, home)
        with closing(connect(file, "mode=ro&immutable=1")) as connection:
            # No value is longer than the file that holds it.
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, min(connection.held, LONGEST_VALUE))
            end = monotonic() + SECONDS + connection.held / SPEED
            connection.set_progress_handler(lambda: monotonic() > end, STEPS)
            try:
                _check_tables(connection)
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


def connect(file: Path, mode: str) -> CatalogueConnection:
    """A connection of SQLite whose transactions are begun by `begin`, and not by Python."""
    address = f"file:{quote(os.fsencode(file.absolute()))}?{mode}"
    connection = sqlite3.connect(
        address, uri=True, isolation_level=None, check_same_thread=False, factory=CatalogueConnection
    )
    connection.home, connection.held = file.parent, _held_bytes(file)
    # What SQLite advises for a file from elsewhere (https://sqlite.org/security.html).
    connection.execute("pragma trusted_schema = off")
    connection.execute("pragma cell_size_check = on")
    return connection


def check_regular(file: Path) -> None:
    """Refuse a file that is a link, a pipe without a writer, which would be waited for, a device, or a folder."""
    try:
        regular = S_ISREG(file.lstat().st_mode)
    except OSError:  # it is not there, or the folder may not be looked at, which the opening reports
        return
    if not regular:
        what = f"{file}: is not a regular file, so no run of loralens has written it"
        raise OptionError(what, fix=f"remove {file.parent}, and index again")


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


def _check_tables(connection: CatalogueConnection) -> None:
    """Refuse tables that an update does not make: a view or a computed column in their place may run without end."""
    if frozenset(connection.read(_SCHEMA)) != _own_tables():
        raise UnusableIndexError(
            f"{connection.home}: the catalogue has other tables than this version of loralens makes",
            fix=f"index again: {index_command(connection.home)}",
        )


_SCHEMA = "select type, name, tbl_name, sql from sqlite_master"


@cache
def _own_tables() -> frozenset[tuple[Any, ...]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(TABLES)
        return frozenset(connection.execute(_SCHEMA))


def _held_bytes(file: Path) -> int:
    """The bytes of the catalogue, which may be a sparse file of any size; a disk may hold it compressed."""
    if not file.exists():  # a copy that is about to be made
        return 0
    status = file.stat()
    return min(status.st_size, max(MOST_COMPRESSED * 512 * getattr(status, "st_blocks", status.st_size), SMALL))


def is_interrupted(error: Exception) -> bool:
    """Whether the handler of `open_to_read` has stopped SQLite: after too long a time, or for a signal."""
    return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_INTERRUPT


def damaged(home: Path, root: Path | None = None) -> UnusableIndexError:
    """The error for a catalogue that no update can have written."""
    return UnusableIndexError(f"{home}: the catalogue is damaged", fix=f"index again: {index_command(home, root)}")


@contextmanager
def catalogue_errors(home: Path) -> Iterator[None]:
    """Turn an error of SQLite into one that says what to do."""
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


# Reading


def read_state(home: Path, *, name: str = CATALOGUE, check: bool = False, with_sketches: bool = True) -> FleetState:
    """Everything that questions need, of one state of the index; without sketches those are empty.

    With ``check``, all that an update goes on with is looked at, too, and refused if no update can have written it.
    """
    with open_to_read(home, name) as connection:
        root, reading = connection.root(), connection.reading()
        rows, files = list(connection.read(_MEMBER)), list(connection.read(_FILE))
        signatures = dict(connection.read("select signature, modules from signatures"))
        with _damage_of(home, root):
            _check_members(rows)
            check_columns(files, _FILE_KINDS.values())
            if check:
                _check_rest(connection, len(rows), signatures)
            # Not sorted by SQLite, which would write what hostile pages repeat without end to a file first.
            rows.sort(key=lambda row: (*_text_first(row[1]), row[0]))
            sketches = _read_sketches(connection, rows if with_sketches else [])
    files.sort(key=lambda row: (*_text_first(row[1]), row[-1]))
    of_status = {
        wanted: tuple(
            Unreadable(name_of(name), root / name_of(path), size, reason, fix)
            for path, name, status, _, _, size, reason, fix, _, _ in files
            if status == wanted
        )
        for wanted in ("unreadable", "other")
    }
    return FleetState(
        root,
        reading,
        tuple(_member(row, root) for row in rows),
        of_status["unreadable"],
        of_status["other"],
        sketches,
        {name_of(path): FileRow(status, stamp, name_of(real)) for path, _, status, stamp, real, *_ in files},
        signatures,
    )


def _read_sketches(connection: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> Sketches:
    """The sketches of members in the order of their rows; a ValueError if one is missing or has another length."""
    codes = np.empty((len(rows), WIDTH + START_WIDTH), np.int8)
    row_of = {row[0]: i for i, row in enumerate(rows)}
    for number, content in connection.execute("select number, codes from sketches") if rows else ():
        row = row_of.pop(number, None)
        if row is None or not isinstance(content, bytes) or len(content) != codes.shape[1]:
            raise ValueError(f"sketch {number}")
        codes[row] = np.frombuffer(content, np.int8)
    if row_of:
        raise ValueError("no sketch")
    return Sketches(codes[:, :WIDTH], np.array([row[-1] for row in rows], np.float64), codes[:, WIDTH:])


def _check_rest(connection: CatalogueConnection, members: int, signatures: Mapping[object, object]) -> None:
    """Raise a ValueError if pages are damaged, or an adapter lacks its sketch, or the norms of its modules."""
    if connection.execute("pragma quick_check").fetchone()[0] != "ok":
        raise ValueError("pages")
    if connection.execute(_SKETCHES, [WIDTH + START_WIDTH]).fetchone() != (members, members):
        raise ValueError("sketches")
    check_columns(list(signatures.items()), (is_text, are_modules))
    modules = {digest: len(decode_list(text)) for digest, text in signatures.items()}
    for norms, number, signature in connection.read(
        "select norms, modules, signature from files where status = 'adapter'"
    ):
        sizes = decode_list(norms)
        if not (are_sizes(sizes) and len(sizes) == number == modules.get(signature)):
            raise ValueError(f"{number} modules")


# How many sketches there are, and how many of them are such as an update writes.
_SKETCHES = """select (select count(*) from sketches), (select count(*) from sketches join files using (number)
    where status = 'adapter' and typeof(codes) = 'blob' and length(codes) = ?)"""


def is_whole_disk(folder: Path) -> bool:
    """Whether a folder, or the target of a link, is that at the top of all others."""
    return os.path.realpath(folder) == os.sep


def to_signature(text: object) -> Signature:
    """A signature as the catalogue stores it: a list of key, name and shape of every module; or a ValueError."""
    if not are_modules(text):
        raise ValueError("no signature")
    modules = decode_list(text)
    return Signature(
        tuple(key for key, *_ in modules),
        tuple(name for _, name, *_ in modules),
        tuple((out, in_) for *_, out, in_ in modules),
    )


def read_norms(home: Path, member: Member, signature: Signature) -> Mapping[str, float]:
    """Key → ‖ΔW‖_F of the modules of a member."""
    with open_to_read(home) as connection:
        row = connection.execute("select norms from files where number = ?", [member.number]).fetchone()
    if row is None or row[0] is None:
        raise FormatError(f"{member.path}: is not in the index any more", fix="take the members of the fleet anew")
    with _damage_of(home):
        sizes = decode_list(row[0])
        check_columns([[sizes]], [are_sizes])
        return dict(zip(signature.keys, sizes, strict=True))


def stored_name(name: str) -> str | bytes:
    """A path as the catalogue stores it: text, or the bytes of a path that is not text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name)
    return name


def name_of(stored: object) -> str:
    """A path that the catalogue has stored."""
    return os.fsdecode(stored) if isinstance(stored, bytes) else str(stored)


def _text_first(name: str | bytes) -> tuple[bool, str | bytes]:
    """The key by which SQLite sorts names: those that are text come before those that are bytes."""
    return isinstance(name, bytes), name


def _member(row: tuple[Any, ...], root: Path) -> Member:
    fields = dict(zip(_MEMBER_KINDS, row, strict=True))
    del fields["step"]
    fields["name"], fields["real"] = name_of(fields["name"]), name_of(fields["real"])
    fields["path"] = root / name_of(fields["path"])
    for name in ("ranks", "scales", "findings"):
        fields[name] = decode_again(fields[name])
    return Member(**fields)


# Whether rows are such as an update writes them


@contextmanager
def _damage_of(home: Path, root: Path | None = None) -> Iterator[None]:
    """Turn a ValueError into the error for a catalogue that no update can have written."""
    try:
        yield
    except ValueError as error:
        raise damaged(home, root) from error


def check_columns(rows: Sequence[Sequence[object]], kinds: Iterable[Callable[[Any], bool]]) -> None:
    """Raise a ValueError if a value of any row is not of its kind. Columns are checked, which takes half the time."""
    for column, kind in zip(zip(*rows, strict=True), kinds, strict=bool(rows)):
        if not all(map(kind, column)):
            raise ValueError(f"{next(value for value in column if not kind(value))!r:.40}")


def _check_members(rows: Sequence[tuple[Any, ...]]) -> None:
    """Raise a ValueError if a row of a member is not such as an update writes it."""
    check_columns(rows, _MEMBER_KINDS.values())
    if any(leads_out(name_of(row[2])) for row in rows):
        raise ValueError("a path out of the folder")


def decode_list(text: object) -> tuple[Any, ...]:
    """A list that is stored as JSON, or a ValueError."""
    decoded = parse_json(text) if isinstance(text, str) else None
    if not isinstance(decoded, list):
        raise ValueError("not a list")  # noqa: TRY004 - what is wrong is the content of a file
    return tuple(decoded)


# Most adapters of a fleet have the same few lists of ranks, scales and findings.
decode_again = lru_cache(maxsize=256)(decode_list)


def is_whole(value: object) -> bool:
    """Whether it is a whole number that is not negative."""
    return type(value) is int and value >= 0


def is_size(value: object) -> bool:
    """Whether it is a number that a norm, a step or a rank can be."""
    number = finite_number(value)
    return number is not None and number >= 0


def is_text(value: object) -> bool:
    """Whether it is a text."""
    return isinstance(value, str)


def is_base_or_nothing(value: object) -> bool:
    """Whether it is the name of a base as readers accept it, or missing."""
    return value is None or plain_text(value) is not None


def is_name(value: object) -> bool:
    """Whether it is a path or a name as they are stored: text or bytes."""
    if not isinstance(value, str | bytes) or len(value) > LONGEST_PATH:
        return False
    return (b"\0" if isinstance(value, bytes) else "\0") not in value  # type: ignore[operator]


def are_ranks(text: object) -> bool:
    """Whether it is a list of ranks, with at least one."""
    ranks = decode_again(text)
    return bool(ranks) and all(map(is_whole, ranks))


def are_scales(text: object) -> bool:
    """Whether it is a list of finite numbers."""
    return all(finite_number(scale) is not None for scale in decode_again(text))


def are_sizes(numbers: Sequence[object]) -> bool:
    """Whether they can be norms; there are many, so they are looked at together."""
    if not numbers or not {type(number) for number in numbers} <= {int, float}:
        return not numbers
    # A whole number may be beyond all floats, and the sum shows a NaN.
    return 0 <= min(numbers) <= max(numbers) <= float_info.max and isfinite(sum(map(float, numbers)))  # type: ignore[arg-type, type-var, operator]


def are_texts(text: object) -> bool:
    """Whether it is a list of texts."""
    return all(map(is_text, decode_again(text)))


def are_modules(text: object) -> bool:
    """Whether it is a list of modules: key, name, out and in of each."""
    return all(
        isinstance(module, list)
        and len(module) == 4
        and all(map(is_text, module[:2]))
        and all(map(is_whole, module[2:]))
        for module in decode_list(text)
    )


def leads_out(path: str) -> bool:
    """Whether a path may lead out of the folder that it is joined to."""
    drive, path_on_drive = os.path.splitdrive(path)
    return (
        bool(drive) or path_on_drive.startswith(("/", "\\")) or os.pardir in path_on_drive.replace("\\", "/").split("/")
    )


_MEMBER_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "number": is_whole,
    "name": is_name,
    "path": is_name,
    "real": is_name,
    "bytes": is_whole,
    "format": is_text,
    "base": is_base_or_nothing,
    "inferred": is_base_or_nothing,
    "signature": is_text,
    "modules": is_whole,
    "zero_modules": is_whole,
    "extras": is_whole,
    "ranks": are_ranks,
    "scales": are_scales,
    "parameters": is_whole,
    "frobenius": is_size,
    "effective_rank": is_size,
    "fingerprint": is_text,
    "findings": are_texts,
    "added": is_text,
    "step": is_size,
}
_MEMBER = f"select {', '.join(_MEMBER_KINDS)} from files where status = 'adapter'"  # noqa: S608 - names of ours
_FILE_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "path": is_name,
    "name": is_name,
    "status": lambda status: status in ("adapter", "unreadable", "other"),
    "stamp": is_text,
    "real": is_name,
    "bytes": is_whole,
    "reason": is_text,
    "fix": is_text,
    "added": is_text,
    "number": is_whole,
}
_FILE = f"select {', '.join(_FILE_KINDS)} from files"  # noqa: S608
