"""What is on the disk: slots and their checksums, commits, one writer and its readers, damaged files, and SELECTs."""

import errno
import os
import shutil
import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens.errors import FormatError
from loralens.fleet.answers import rows as select
from loralens.fleet.catalogue import schema, writing
from loralens.fleet.catalogue.schema import SKETCHES
from loralens.fleet.catalogue.slots import SLOT, read_slots
from loralens.fleet.catalogue.writing import CatalogueWriter
from tests.fleet.makers import random_adapter, save, save_many


@pytest.fixture
def fleet(tmp_path: Path) -> loralens.Fleet:
    save_many(tmp_path, 4)
    fleet = loralens.Fleet.open(tmp_path)
    fleet.update(tmp_path)
    return fleet


def test_a_changed_file_gets_a_fresh_slot_and_a_freed_slot_is_used_again(fleet: loralens.Fleet, tmp_path: Path) -> None:
    before = {member.name: member.slot for member in fleet.members()}
    contents = read_slots(fleet.home).copy()
    save(tmp_path / "a001", random_adapter(11), overwrite=True)
    fleet.update()
    after = {member.name: member.slot for member in fleet.members()}
    assert after["a001"] not in before.values()
    # The old slot holds what it held: a reader of the last state still finds its content.
    np.testing.assert_array_equal(read_slots(fleet.home)[before["a001"]], contents[before["a001"]])
    save(tmp_path / "new", random_adapter(12))
    fleet.update()
    assert {member.name: member.slot for member in fleet.members()}["new"] == before["a001"]
    assert (fleet.home / SKETCHES).stat().st_size == 5 * SLOT


def test_a_slot_is_on_the_disk_before_its_row_is_committed(
    fleet: loralens.Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is stopped at every step of a commit; a reader always finds a complete state."""
    old = np.array(fleet.sketches().codes)
    save(tmp_path / "a001", random_adapter(11), overwrite=True)
    steps: list[str] = []

    def stop(name: str) -> None:
        steps.append(name)
        raise KeyboardInterrupt

    from loralens.fleet.catalogue import slots

    write = slots.write_at
    monkeypatch.setattr(slots, "write_at", lambda descriptor, data, offset: write(descriptor, data[:100], offset))
    monkeypatch.setattr(slots.os, "fsync", lambda _: stop("fsync"))
    with pytest.raises(KeyboardInterrupt):
        fleet.update()
    assert "fsync" in steps
    monkeypatch.undo()
    reader = loralens.Fleet.open(tmp_path)
    np.testing.assert_array_equal(reader.sketches().codes, old)
    assert len(reader.update().changes) == 1
    assert not np.array_equal(reader.sketches().codes, old)


@pytest.mark.parametrize("damage", ["flipped", "short", "missing"])
def test_a_damaged_slot_is_found_and_measured_again(fleet: loralens.Fleet, tmp_path: Path, damage: str) -> None:
    expected = np.array(fleet.sketches().codes)
    file = fleet.home / SKETCHES
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[fleet.members()[-1].slot * SLOT + 17] ^= 1
        file.write_bytes(content)
    elif damage == "short":
        file.write_bytes(content[: 3 * SLOT + 5])
    else:
        file.unlink()
    reader = loralens.Fleet.open(tmp_path)
    with pytest.raises(loralens.FormatError, match=r"(\d sketches are|the sketch of \w+ is) damaged") as caught:
        reader.sketches()
    assert f"loralens fleet index {tmp_path}" in caught.value.fix
    assert len(reader.update().changes) == (4 if damage == "missing" else 1)
    np.testing.assert_array_equal(reader.sketches().codes, expected)


@pytest.mark.parametrize("damage", ["no database", "middle", "empty", "short"])
def test_a_damaged_catalogue_is_made_anew(
    fleet: loralens.Fleet, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = fleet.home / "catalogue.sqlite"
    content = bytearray(file.read_bytes())
    if damage == "middle":
        content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
    file.write_bytes({"no database": b"x" * 9000, "empty": b"", "short": bytes(content[:5000])}.get(damage, content))
    reader = loralens.Fleet.open(tmp_path)
    with pytest.raises(loralens.LoraLensError, match=r"index again|was made by another"):
        assert reader.rows("select * from files").rows == reader.members()
    assert len(reader.update(tmp_path).changes) == 4
    assert "it is made anew" in caplog.text
    assert len(reader.members()) == 4


def test_an_index_of_another_version_is_refused_and_made_anew(
    fleet: loralens.Fleet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with sqlite3.connect(fleet.home / "catalogue.sqlite") as connection:
        connection.execute("update state set value = '0' where key = 'version'")
    connection.close()
    with pytest.raises(loralens.OptionError, match="another version"):
        loralens.Fleet.open(tmp_path).members()
    assert len(fleet.update(tmp_path).changes) == 4
    assert "another version" in caplog.text


@pytest.mark.some(3)
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("path", "../../elsewhere/adapter_model.safetensors"),
        ("path", "/etc/passwd"),
        ("path", b"a/../../b"),
        ("ranks", "four"),
        ("ranks", None),
        ("findings", b"\xff"),
    ],
)
def test_rows_that_no_update_has_written_are_refused(
    fleet: loralens.Fleet, tmp_path: Path, column: str, value: object
) -> None:
    """An index may come with a collection from anywhere, and its paths must not lead out of it."""
    with sqlite3.connect(fleet.home / "catalogue.sqlite") as connection:
        connection.execute(f"update files set {column} = ? where name = 'a001'", [value])
        connection.execute("update state set value = '99' where key = 'commit'")
    connection.close()
    with pytest.raises(loralens.FormatError, match="the catalogue is damaged") as caught:
        fleet.members()
    assert f"loralens fleet index {tmp_path}" in caught.value.fix
    assert fleet.update(tmp_path).adapters == 4
    assert [member.name for member in fleet.members()] == ["a000", "a001", "a002", "a003"]


def test_signatures_are_kept_as_long_as_they_are_used(fleet: loralens.Fleet, tmp_path: Path) -> None:
    save(tmp_path / "other", random_adapter(5, out=7))
    fleet.update()
    assert len(fleet.rows("select * from signatures")) == 2
    shutil.rmtree(tmp_path / "other")
    fleet.update()
    assert len(fleet.rows("select * from signatures")) == 1


def test_one_writer_at_a_time(fleet: loralens.Fleet, tmp_path: Path) -> None:
    writer = CatalogueWriter(fleet.home)
    try:
        with pytest.raises(loralens.OptionError, match="a run is going on there"):
            loralens.Fleet.open(tmp_path).update()
        assert len(loralens.Fleet.open(tmp_path).members()) == 4
    finally:
        writer.close()
    assert not loralens.Fleet.open(tmp_path).update().changes


def test_readers_see_the_last_commit(fleet: loralens.Fleet, tmp_path: Path) -> None:
    reader = loralens.Fleet.open(tmp_path)
    assert len(reader.members()) == 4
    writer = CatalogueWriter(fleet.home)
    try:
        with writer._transaction():
            writer._connection.execute("delete from files where name = 'a000'")
            assert len(reader.members()) == len(loralens.Fleet.open(tmp_path).members()) == 4
        assert len(reader.members()) == 3
    finally:
        writer.close()


def test_sketches_that_are_mapped_stay_as_they_are(fleet: loralens.Fleet, tmp_path: Path) -> None:
    reader = loralens.Fleet.open(tmp_path)
    members, sketches = reader.snapshot()
    before, starts = np.array(sketches.codes), np.array(sketches.starts)
    writer = loralens.Fleet.open(tmp_path)
    for seed in (11, 12, 13):
        save(tmp_path / "a001", random_adapter(seed), overwrite=True)
        writer.update(tmp_path)
    np.testing.assert_array_equal(sketches.codes, before)
    np.testing.assert_array_equal(sketches.take(np.array([3, 1])).starts, starts[[3, 1]])
    slots = (fleet.home / SKETCHES).stat().st_size // SLOT
    assert slots == 7
    # Nobody reads them any more, so they are used again.
    del members, sketches, reader
    fleet.update(tmp_path)
    for seed in (14, 15):
        save(tmp_path / "a001", random_adapter(seed), overwrite=True)
        loralens.Fleet.open(tmp_path).update(tmp_path)
    assert (fleet.home / SKETCHES).stat().st_size // SLOT == 7


def test_a_full_disk_is_not_a_damaged_catalogue(
    fleet: loralens.Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite ends the transaction itself, and the index stays what it was."""
    save_many(tmp_path / "new", 40)

    def open_full(home: Path) -> sqlite3.Connection:
        connection = schema.open_to_write(home)
        pages = connection.execute("pragma page_count").fetchone()[0]
        connection.execute(f"pragma max_page_count = {pages}")
        return connection

    monkeypatch.setattr(writing, "open_to_write", open_full)
    with pytest.raises(FormatError, match=r"the disk refuses the catalogue: database or disk is full"):
        fleet.update()
    before = len(fleet.snapshot()[0])
    monkeypatch.undo()
    fleet.update()
    assert len(fleet.snapshot()[0]) == before + 40


def test_no_room_for_the_list_of_files_in_work(
    fleet: loralens.Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save(tmp_path / "new", random_adapter(9))
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(FormatError, match=r"in-work\.json\.new: cannot be written: No space left"):
        fleet.update()


@pytest.mark.slow
def test_readers_and_a_writer_at_once(tmp_path: Path) -> None:
    """While a fleet is changed again and again, every reader sees rows and sketches that belong together."""
    save_many(tmp_path, 3)
    fleet = loralens.Fleet.open(tmp_path)
    fleet.update(tmp_path)
    expected = {member.fingerprint: codes.copy() for member, codes in zip(*_snapshot(fleet), strict=True)}
    failures: list[str] = []
    done = threading.Event()

    def read() -> None:
        reader = loralens.Fleet.open(tmp_path)
        while not done.is_set():
            members, codes = _snapshot(reader)
            failures.extend(
                member.name
                for member, row in zip(members, codes, strict=True)
                if member.fingerprint in expected and not np.array_equal(expected[member.fingerprint], row)
            )

    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in readers:
        thread.start()
    try:
        for turn in range(10):
            save(tmp_path / "a001", random_adapter(turn % 2), overwrite=True)
            fleet.update()
    finally:
        done.set()
        for thread in readers:
            thread.join()
    assert not failures


def _snapshot(fleet: loralens.Fleet) -> tuple[object, np.ndarray]:
    members, sketches = fleet.snapshot()
    return members, sketches.codes


def test_a_transaction_of_a_killed_writer_is_undone_by_an_update(fleet: loralens.Fleet, tmp_path: Path) -> None:
    """A journal that is left behind: the catalogue is half written, and the journal has its old pages."""
    file, journal = fleet.home / "catalogue.sqlite", fleet.home / "catalogue.sqlite-journal"
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute("pragma cache_size = 1")
    connection.execute("begin immediate")
    connection.execute("update files set norms = hex(randomblob(5000)), name = 'x' || name")
    torn, kept = file.read_bytes(), journal.read_bytes()
    connection.execute("rollback")
    connection.close()
    whole = file.read_bytes()
    assert torn != whole
    file.write_bytes(torn)
    journal.write_bytes(kept)
    reader = loralens.Fleet.open(tmp_path)
    with pytest.raises(loralens.OptionError, match="was killed") as caught:
        reader.members()
    assert f"loralens fleet index {tmp_path}" in caught.value.fix
    # A reader writes nothing.
    assert (file.read_bytes(), journal.read_bytes()) == (torn, kept)
    assert not reader.update().changes
    assert [member.name for member in reader.members()] == ["a000", "a001", "a002", "a003"]


HOSTILE = [
    "delete from files",
    "update files set name = 'x'",
    "insert into files(path) values('x')",
    "drop table files",
    "create table x(y)",
    "create temp table x(y)",
    "attach 'OUTSIDE' as other",
    "vacuum into 'OUTSIDE'",
    "pragma writable_schema = on",
    "pragma journal_mode = wal",
    "begin",
    "select load_extension('x')",
    "select writefile('OUTSIDE', 'x')",
    "select 1; delete from files",
    "explain delete from files",
    "select zeroblob(1000000000)",
    "select * from nothing",
    "selec",
    "select \x00",
]


@pytest.mark.some(6)
@pytest.mark.parametrize("sql", HOSTILE)
def test_a_select_is_all_that_is_allowed(fleet: loralens.Fleet, tmp_path: Path, sql: str) -> None:
    outside = tmp_path / "outside"
    before = {file.name: file.read_bytes() for file in fleet.home.iterdir()}
    with pytest.raises(loralens.OptionError) as caught:
        fleet.rows(sql.replace("OUTSIDE", str(outside)))
    assert "SELECT" in caught.value.fix
    assert {file.name: file.read_bytes() for file in fleet.home.iterdir()} == before
    assert not outside.exists()


def test_a_select_without_end_is_stopped(fleet: loralens.Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "SECONDS", 0.1)
    endless = "with recursive n(x) as (select 1 union all select x + 1 from n) select count(*) from n"
    with pytest.raises(loralens.OptionError, match="takes longer than"):
        fleet.rows(endless)
    monkeypatch.setattr(schema, "SECONDS", 30.0)
    monkeypatch.setattr(select, "MOST_BYTES", 1 << 16)
    with pytest.raises(loralens.OptionError, match="is larger than"):
        fleet.rows(endless.replace("count(*)", "x"))


def test_rows(fleet: loralens.Fleet) -> None:
    result = fleet.rows("select name, rank, rank, frobenius as norm from adapters where rank > 3 order by name limit 2")
    assert result.columns == ["name", "rank", "rank_2", "norm"]
    assert result.rows[0][:3] == ("a000", 4, 4)
    assert result.record()["rows"][1]["name"] == "a001"
    assert result.to_csv().splitlines()[0] == "name,rank,rank_2,norm"
    assert result.conclusion() == ["2 rows."]
    assert fleet.rows("select value from adapters, json_each(norms) where name = 'a000'").rows[0][0] > 0
    assert (
        len(fleet.rows("with recent as (select * from adapters) select * from recent where added > '2020-01-01'")) == 4
    )
    pytest.importorskip("pandas")
    assert list(result.to_frame()["rank"]) == [4, 4]


def test_stats(fleet: loralens.Fleet, tmp_path: Path) -> None:
    save(tmp_path / "wide", random_adapter(9, rank=16))
    (tmp_path / "bad.safetensors").write_bytes(b"{}")
    fleet.update()
    stats = fleet.stats()
    assert (stats.adapters, stats.unreadable, stats.empty) == (5, 1, 0)
    assert [(row.rank, row.adapters, row.up_to, row.share) for row in stats.ranks] == [(4, 4, 4, 0.8), (16, 1, 5, 1.0)]
    assert [(row.format, row.adapters) for row in stats.formats] == [("peft", 5)]
    assert stats.bytes == sum(member.bytes for member in fleet.members())
    assert stats.index_bytes == sum(file.stat().st_size for file in fleet.home.iterdir())
    assert any("needs a largest rank of 16" in sentence for sentence in stats.sentences())


def test_empty(fleet: loralens.Fleet, tmp_path: Path) -> None:
    assert fleet.empty().conclusion()[0].endswith("none of 4 adapters is empty: each has a ΔW that is not 0.")
    untrained = random_adapter(5).map(lambda m: loralens.LowRank(np.zeros_like(m.B), m.A, m.scale))
    partly = dict(random_adapter(6).items())
    name = next(iter(partly))
    partly[name] = untrained.modules[name]
    save(tmp_path / "partly", loralens.Adapter(modules=partly))
    fleet.update()
    assert "1 adapter has ΔW = 0 in some of the modules (--verbose names it)" in str(fleet.empty())
    save(tmp_path / "untrained", untrained)
    fleet.update()
    result = fleet.empty()
    assert [member.name for member in result] == ["untrained", "partly"]
    assert [member.name for member in result.without_effect] == ["untrained"]
    assert [member.zero_modules for member in result] == [4, 1]
    assert result[0].findings == ("zero-update",)
    assert result.conclusion() == [f"{tmp_path}: 1 of 6 adapters changes no weight: ΔW = 0."]
    assert str(result).rstrip().endswith("1 more adapter has ΔW = 0 in some of the modules")
    assert result.record()["empty"][0]["name"] == "untrained"
