"""Indexes that somebody has made to do harm: what each of them changes in a sound one, beside a file of the user."""

import os
import shutil
import sqlite3
import struct
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

CATALOGUE = "catalogue.sqlite"
PART = f".{CATALOGUE}.part"  # the copy that an update changes


MAGIC = bytes.fromhex("d9d505f920a163d7")
ENDLESS = "with recursive n(x) as (select 1 union all select x + 1 from n) select"
LONG = "x" * 300

Attack = Callable[[Path, Path], None]


def change(home: Path, *statements: str, values: tuple[object, ...] = ()) -> None:
    """Run statements on the catalogue; ``values`` belong to the last one."""
    with closing(sqlite3.connect(home / CATALOGUE, isolation_level=None)) as connection:
        for statement in statements[:-1]:
            connection.execute(statement)
        connection.execute(statements[-1], values)


def super_journal(name: str) -> Attack:
    """A hot journal of a file that names another one; SQLite deletes this one when it undoes the transaction."""

    def attack(home: Path, victim: Path) -> None:
        if name != CATALOGUE:
            shutil.copy(home / CATALOGUE, home / name)
        written = os.fsencode(victim)
        page = (home / name).stat().st_size // 4096
        header = MAGIC + struct.pack(">IIIII", 0, 0, page, 512, 4096)
        summed = sum(struct.unpack(f"{len(written)}b", written)) & 0xFFFFFFFF
        end = struct.pack(">II", len(written), summed) + MAGIC
        lock_page = struct.pack(">I", (1 << 30) // 4096 + 1)
        (home / f"{name}-journal").write_bytes(header.ljust(512, b"\0") + lock_page + written + end)

    return attack


def left_behind(attack: Attack) -> Attack:
    """What an attack makes of a catalogue is the copy that a killed writer has left."""

    def attack_copy(home: Path, victim: Path) -> None:
        sound = (home / CATALOGUE).read_bytes()
        attack(home, victim)
        (home / CATALOGUE).replace(home / PART)
        (home / CATALOGUE).write_bytes(sound)

    return attack_copy


def foreign_log(home: Path, victim: Path) -> None:
    """A catalogue in another mode, and beside it and beside a copy of it a log that changes every name."""
    del victim
    with closing(sqlite3.connect(home / CATALOGUE, isolation_level=None)) as connection:
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma wal_autocheckpoint = 0")
        connection.execute("update files set name = 'changed'")
        log = (home / f"{CATALOGUE}-wal").read_bytes()
        content = (home / CATALOGUE).read_bytes()
    for name in (CATALOGUE, PART):
        (home / name).write_bytes(content)
        (home / f"{name}-wal").write_bytes(log)


def replaced_by_view(table: str, select: str) -> Attack:
    """A view in place of a table."""

    def attack(home: Path, victim: Path) -> None:
        del victim
        change(home, f"alter table {table} rename to kept", f"create view {table} as {select}")

    return attack


def endless_state(home: Path, victim: Path) -> None:
    """Every query of the catalogue's own settings runs without end."""
    select = f"{ENDLESS} '' || x as key, '' as value from n where x < 0 union all select key, value from kept"
    replaced_by_view("state", select)(home, victim)


def endless_files(home: Path, victim: Path) -> None:
    """A view with the columns of the table, and a condition that is computed without end."""
    replaced_by_view("files", f"select * from kept where ({ENDLESS} count(*) from n) > 0")(home, victim)


def computed_column(home: Path, victim: Path) -> None:
    """A column that is computed, with 900 MB in every row."""
    del victim
    with closing(sqlite3.connect(home / CATALOGUE, isolation_level=None)) as connection:
        sql = connection.execute("select sql from sqlite_master where name = 'files'").fetchone()[0]
        changed = sql.replace("findings text,\n", "findings blob as (zeroblob(900000000)),\n")
        assert changed != sql
        connection.execute("pragma writable_schema = on")
        connection.execute("update sqlite_master set sql = ? where name = 'files'", [changed])


def shared_pages(home: Path, victim: Path) -> None:
    """A tree whose inner pages all name one page, so that few pages have more rows than anybody can read."""
    del victim
    with closing(sqlite3.connect(home / CATALOGUE, isolation_level=None)) as connection:
        root = connection.execute("select rootpage from sqlite_master where name = 'files'").fetchone()[0]
        size = connection.execute("pragma page_size").fetchone()[0]
        count = connection.execute("pragma page_count").fetchone()[0]
    content = bytearray((home / CATALOGUE).read_bytes())
    assert len(content) == size * count
    levels = 8
    leaf = content[(root - 1) * size : root * size]
    cells = 300
    for level in range(levels):
        below = count + level + 1
        # An inner page of a table: its cells have the number of a page below and a key.
        cell = struct.pack(">I", below) + b"\x01"
        start = size - len(cell)
        page = struct.pack(">BHHHBI", 5, 0, cells, start, 0, below)
        page += struct.pack(">H", start) * cells
        page = page.ljust(start, b"\0") + cell
        if level:
            content += page
        else:
            content[(root - 1) * size : root * size] = page
    content += leaf
    content[28:32] = struct.pack(">I", len(content) // size)
    (home / CATALOGUE).write_bytes(content)


def sparse_shared_pages(home: Path, victim: Path) -> None:
    """The same in a file of a terabyte, of which the disk holds only the beginning."""
    shared_pages(home, victim)
    os.truncate(home / CATALOGUE, 1 << 40)


def sparse(name: str, size: int = 1 << 34) -> Attack:
    """A file of the index is far larger than what the disk holds of it."""

    def attack(home: Path, victim: Path) -> None:
        del victim
        (home / name).touch()
        os.truncate(home / name, size)

    return attack


def put(name: str, make: Callable[[Path, Path], object]) -> Attack:
    """In place of a file of the index stands what is made at its path, beside the victim."""

    def attack(home: Path, victim: Path) -> None:
        (home / name).unlink(missing_ok=True)
        make(home / name, victim)

    return attack


def state(key: str, value: object) -> Attack:
    """A setting with this value."""

    def attack(home: Path, victim: Path) -> None:
        del victim
        change(home, "insert or replace into state values(?, ?)", values=(key, value))

    return attack


def column(name: str, value: object) -> Attack:
    """A row has this value in one column."""

    def attack(home: Path, victim: Path) -> None:
        del victim
        change(home, f"update files set {name} = ? where number = 1", values=(value,))

    return attack


NAMES = (CATALOGUE, PART)
# Files that SQLite would look at. No run of loralens writes them.
SIDE = tuple(f"{name}-{end}" for name in NAMES for end in ("journal", "wal", "shm"))
CHANGED: Mapping[str, Attack] = {
    "endless settings": endless_state,
    "endless files": endless_files,
    "computed column": computed_column,
    "shared pages": shared_pages,
    "sparse shared pages": sparse_shared_pages,
    "root of 300 letters": state("root", LONG),
    "root with NUL": state("root", "a\0b"),
    "root /": state("root", "/"),
    "root //": state("root", "//"),
    "root above": state("root", "../" * 40),
    "path of a million folders": column("path", "a/" * 1_000_000),
}
ATTACKS: Mapping[str, Attack] = {
    **CHANGED,
    **{f"{name}, left behind": left_behind(attack) for name, attack in CHANGED.items()},
    **{f"super-journal of {name}": super_journal(name) for name in (CATALOGUE, PART)},
    "log of another": foreign_log,
    **{f"sparse {name}": sparse(name, 1 << 40) for name in (CATALOGUE, PART)},
    "other root, of bytes": state("root", b"\xff"),
    "reading of bytes": state("reading", b"once=True"),
    "path of 2,000 folders": column("path", "a/" * 2_000 + "b"),
    **{f"{name} of 300 letters": column(name, LONG) for name in ("path", "name", "real")},
    **{f"hard link {name}": put(name, lambda path, victim: os.link(victim, path)) for name in NAMES},
    **{
        f"{word} {name}": put(name, make)
        for name in (*NAMES, *SIDE)
        for word, make in {
            "link": Path.symlink_to,
            "link to itself": lambda path, _: path.symlink_to(path.name),
            "zero": lambda path, _: path.symlink_to("/dev/zero"),
            "pipe": lambda path, _: os.mkfifo(path),
            "folder": lambda path, _: path.mkdir(),
        }.items()
    },
}
