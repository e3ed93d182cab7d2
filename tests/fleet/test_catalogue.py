"""What is on the disk: one database that is replaced as a whole, one writer and its readers, damage, and SELECTs."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens import FormatError
from loralens.fleet import catalogue, catalogue_writer
from loralens.fleet.catalogue import PART
from loralens.fleet.catalogue_writer import CatalogueWriter
from loralens.verbs.fleets import index_answers
from tests.fleet.makers import indexed, random_adapter, save, save_many


@pytest.fixture
def fleet(tmp_path: Path) -> loralens.Fleet:
    save_many(tmp_path, 4)
    return indexed(tmp_path)


def change(fleet: loralens.Fleet, sql: str, *values: object) -> None:
    with closing(sqlite3.connect(fleet.home / "catalogue.sqlite", isolation_level=None)) as connection:
        connection.execute(sql, values)


def test_a_killed_update_leaves_the_old_state(
    fleet: loralens.Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder as it is after a part was written, which is what a kill leaves."""
    save(tmp_path / "a001", random_adapter(11), overwrite=True)
    inner = CatalogueWriter.store

    def store(self: CatalogueWriter, *given: object) -> None:
        inner(self, *given)  # type: ignore[arg-type]
        shutil.copytree(self.home, tmp_path / "left", dirs_exist_ok=True)

    monkeypatch.setattr(CatalogueWriter, "store", store)
    old = [member.fingerprint for member in fleet.members()]
    loralens.Fleet.open(tmp_path).update()
    monkeypatch.undo()
    new = [member.fingerprint for member in fleet.members()]
    left = {path.name for path in (tmp_path / "left").iterdir()}
    assert left == {"catalogue.sqlite", PART}
    shutil.rmtree(fleet.home)
    (tmp_path / "left").rename(fleet.home)
    reader = loralens.Fleet.open(tmp_path)
    assert [member.fingerprint for member in reader.members()] == old
    assert len(reader.update().changes) == 1
    assert [path.name for path in fleet.home.iterdir()] == ["catalogue.sqlite"]
    assert [member.fingerprint for member in reader.members()] == new


@pytest.mark.parametrize("damage", ["no database", "middle", "empty", "short", "long", "no sketch", "short sketch"])
def test_a_damaged_catalogue_is_made_anew(
    fleet: loralens.Fleet, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = fleet.home / "catalogue.sqlite"
    content = bytearray(file.read_bytes())
    if damage == "middle":
        content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
    damaged = {"no database": b"x" * 9000, "empty": b"", "short": content[:5000], "long": content + bytes(4096)}
    file.write_bytes(damaged.get(damage, content))
    if damage == "no sketch":
        change(fleet, "update files set sketch = null where number = 2")
    elif damage == "short sketch":
        change(fleet, "update files set sketch = x'00' where number = 2")
    reader = loralens.Fleet.open(tmp_path)
    with pytest.raises(loralens.FormatError, match="the catalogue is damaged") as caught:
        reader.near("a000", sketch=True)
    assert f"loralens fleet index {tmp_path}" in caught.value.fix
    assert len(reader.update(tmp_path).changes) == 4
    assert "it is made anew" in caplog.text
    assert len(reader.members()) == 4


def test_an_index_of_an_older_form_is_refused_and_made_anew(
    fleet: loralens.Fleet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (fleet.home / "catalogue.sqlite").unlink()
    change(fleet, "create table state(key text primary key, value text not null) without rowid")
    change(fleet, "insert into state values('version', '2')")
    for reader in (loralens.Fleet.open(tmp_path).members, loralens.Fleet.open(tmp_path).stats):
        with pytest.raises(loralens.FormatError, match="another version of loralens, and has another form") as caught:
            reader()
        assert caught.value.fix == f"make it anew: loralens fleet index {tmp_path}"
    assert len(fleet.update(tmp_path).changes) == 4
    assert "when each file was first indexed is lost" in caplog.text
    assert [path.name for path in fleet.home.iterdir()] == ["catalogue.sqlite"]


def test_one_writer_and_readers_of_the_last_complete_state(fleet: loralens.Fleet, tmp_path: Path) -> None:
    reader = loralens.Fleet.open(tmp_path)
    members, sketches = reader.snapshot()
    before = sketches.codes.copy()
    writer = CatalogueWriter(fleet.home)
    try:
        with pytest.raises(loralens.OptionError, match="a run is going on there"):
            loralens.Fleet.open(tmp_path).update()
        writer.remove([str(members[0].path.relative_to(tmp_path))])
        assert len(reader.members()) == len(loralens.Fleet.open(tmp_path).members()) == 4
    finally:
        writer.close()
    assert len(reader.members()) == 3
    np.testing.assert_array_equal(sketches.codes, before)
    assert len(loralens.Fleet.open(tmp_path).update().changes) == 1


def test_a_full_disk_is_not_a_damaged_catalogue(
    fleet: loralens.Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite ends the transaction itself, and the index stays what it was."""
    save_many(tmp_path / "new", 40)
    inner = catalogue_writer.connect

    def connect_full(*given: object) -> sqlite3.Connection:
        connection = inner(*given)  # type: ignore[arg-type]
        connection.execute(f"pragma max_page_count = {connection.execute('pragma page_count').fetchone()[0]}")
        return connection

    monkeypatch.setattr(catalogue_writer, "connect", connect_full)
    with pytest.raises(FormatError, match=r"the disk refuses the catalogue: database or disk is full"):
        fleet.update()
    before = len(fleet.members())
    monkeypatch.undo()
    fleet.update()
    assert len(fleet.members()) == before + 40


HOSTILE = [
    "delete from files",
    "drop table files",
    "create temp table x(y)",
    "attach 'OUTSIDE' as other",
    "vacuum into 'OUTSIDE'",
    "pragma writable_schema = on",
    "select load_extension('x')",
    "select writefile('OUTSIDE', 'x')",
    "select 1; delete from files",
    "explain delete from files",
    "select zeroblob(1000000000)",
    "select * from nothing",
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
    monkeypatch.setattr(catalogue, "SECONDS", 0.1)
    endless = "with recursive n(x) as (select 1 union all select x + 1 from n) select count(*) from n"
    with pytest.raises(loralens.OptionError, match="takes longer than"):
        fleet.rows(endless)
    monkeypatch.setattr(catalogue, "SECONDS", 30.0)
    monkeypatch.setattr(index_answers, "MOST_BYTES", 1 << 16)
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
