"""Indexes that somebody has made to do harm: what each of them changes in a sound one, beside a file of the user."""

import os
import sqlite3
import struct
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from loralens.fleet.catalogue.schema import CATALOGUE, DATES, IN_WORK, JOURNAL, NEXT_DATES, NEXT_IN_WORK, SKETCHES

MAGIC, SUPER_MAGIC = (bytes.fromhex(text) for text in ("d9d505f920a163d7", "d9d505f920a163d7"))
ENDLESS = "with recursive n(x) as (select 1 union all select x + 1 from n) select"
LONG = "x" * 300

Attack = Callable[[Path, Path], None]


def change(home: Path, *statements: str, values: tuple[object, ...] = ()) -> None:
    """Run statements on the catalogue; ``values`` belong to the last one."""
    with closing(sqlite3.connect(home / CATALOGUE, isolation_level=None)) as connection:
        for statement in statements[:-1]:
            connection.execute(statement)
        connection.execute(statements[-1], values)


def super_journal(home: Path, victim: Path) -> None:
    """A hot journal that names another file; SQLite deletes this file when it undoes the transaction."""
    name = os.fsencode(victim)
    page = (home / CATALOGUE).stat().st_size // 4096
    header = MAGIC + struct.pack(">IIIII", 0, 0, page, 512, 4096)
    end = struct.pack(">II", len(name), sum(struct.unpack(f"{len(name)}b", name)) & 0xFFFFFFFF) + SUPER_MAGIC
    lock_page = struct.pack(">I", (1 << 30) // 4096 + 1)
    (home / JOURNAL).write_bytes(header.ljust(512, b"\0") + lock_page + name + end)


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
        changed = sql.replace("findings text\n", "findings text as (zeroblob(900000000))\n")
        assert changed != sql
        connection.execute("pragma writable_schema = on")
        connection.execute("update sqlite_master set sql = ? where name = 'files'", [changed])


def write_ahead(home: Path, victim: Path) -> None:
    """A database in another mode, in which SQLite writes also where it only reads."""
    del victim
    change(home, "pragma journal_mode = wal")


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


def linked(name: str, target: str | None = None) -> Attack:
    """A file of the index is a link: to the victim, or to ``target``."""

    def attack(home: Path, victim: Path) -> None:
        (home / name).unlink(missing_ok=True)
        (home / name).symlink_to(target or victim)

    return attack


def hard_linked(name: str) -> Attack:
    """A file of the index is a second name of the victim."""

    def attack(home: Path, victim: Path) -> None:
        (home / name).unlink()
        os.link(victim, home / name)

    return attack


def anew_through_link(home: Path, victim: Path) -> None:
    """An index of another version, whose dates an update writes to a file that is a link."""
    change(home, "update state set value = '0' where key = 'version'")
    linked(NEXT_DATES)(home, victim)


def pipe(name: str) -> Attack:
    """A file of the index is a pipe without a writer."""

    def attack(home: Path, victim: Path) -> None:
        del victim
        (home / name).unlink(missing_ok=True)
        os.mkfifo(home / name)

    return attack


def folder(name: str) -> Attack:
    """A file of the index is a folder."""

    def attack(home: Path, victim: Path) -> None:
        del victim
        (home / name).unlink(missing_ok=True)
        (home / name).mkdir()

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


NAMES = (CATALOGUE, JOURNAL, SKETCHES, IN_WORK, NEXT_IN_WORK, DATES, NEXT_DATES)
SIDE = (f"{CATALOGUE}-wal", f"{CATALOGUE}-shm")
ATTACKS: Mapping[str, Attack] = {
    "super-journal": super_journal,
    "endless settings": endless_state,
    "endless files": endless_files,
    "computed column": computed_column,
    "shared pages": shared_pages,
    "sparse shared pages": sparse_shared_pages,
    **{f"sparse {name}": sparse(name) for name in (IN_WORK, DATES)},
    "sparse catalogue": sparse(CATALOGUE, 1 << 40),
    "write-ahead log": write_ahead,
    "root of 300 letters": state("root", LONG),
    "root with NUL": state("root", "a\0b"),
    "root /": state("root", "/"),
    "root //": state("root", "//"),
    "root above": state("root", "../" * 40),
    "other root, of bytes": state("root", b"\xff"),
    "reading of bytes": state("reading", b"once=True"),
    "commit of bytes": state("commit", b"\xff"),
    "path of a million folders": column("path", "a/" * 1_000_000),
    "path of 2,000 folders": column("path", "a/" * 2_000 + "b"),
    "path of 300 letters": column("path", LONG),
    "name of 300 letters": column("name", LONG),
    "real of 300 letters": column("real", LONG),
    "made anew through a link": anew_through_link,
    **{f"link {name}": linked(name) for name in (*NAMES, *SIDE)},
    **{f"hard link {name}": hard_linked(name) for name in (CATALOGUE, SKETCHES)},
    **{f"link to itself {name}": linked(name, name) for name in (*NAMES, *SIDE)},
    **{f"zero {name}": linked(name, "/dev/zero") for name in (*NAMES, *SIDE)},
    **{f"pipe {name}": pipe(name) for name in (*NAMES, *SIDE)},
    **{f"folder {name}": folder(name) for name in (*NAMES, *SIDE)},
}
