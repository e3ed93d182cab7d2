"""The page of a fleet: what it says, what it refuses, and that hostile names stay text."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens import Fleet, OptionError
from loralens.charts.spec import HeatMap
from loralens.reporting.document import Picture
from loralens.verbs.fleets import fleet_page
from tests.fleet.synthetic import adapter_of, make_fleet, random_factors


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    folder = tmp_path / "fleet"
    make_fleet(folder, families=3, runs=2, checkpoints=2)
    shutil.copytree(folder / "f0-r0" / "checkpoint-200", folder / "<b>bold")
    loralens.save(adapter_of(random_factors(np.random.default_rng(7), 2)), folder / "low")
    (folder / "bad.safetensors").write_bytes(b"{}")
    Fleet.open(folder).update(folder)
    return folder


def test_the_page_has_what_the_fleet_answers(fleet: Path, tmp_path: Path) -> None:
    result = loralens.report(fleet=fleet, output=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert result.document.headline.startswith("14 adapters of ")
    assert "3 families, and 1 adapter in none." in result.document.headline
    keys = [section.key for section in result.document.sections]
    assert keys == ["findings", "families", "ranks", "sizes", "bases", "runs", "copies", "newest"]
    assert "<b>bold" not in page
    assert "&lt;b&gt;bold" in page
    assert "2 bytes are too few for any tensor file" in page
    record = result.record()
    assert record["members"] == 14
    assert [(row["rank"], row["adapters"], row["fitting"]) for row in record["ranks"]] == [(2, 1, 1), (8, 13, 14)]
    assert sum(row["total"] for row in record["sizes"]) == record["bytes"]
    deleted = {Path(path).parent for path in record["copies"]["safe_to_delete"]}
    assert deleted == {fleet / "f0-r0" / "checkpoint-200"}
    assert record["families"] == loralens.Fleet.open(fleet).families().record()


def family_picture(fleet: Path) -> tuple[Picture, HeatMap]:
    sections = loralens.report(fleet=fleet).document.sections
    parts = next(section.parts for section in sections if section.key == "families")
    picture = next(part for part in parts if isinstance(part, Picture))
    (chart,) = picture.panels[0].charts
    assert isinstance(chart, HeatMap)
    return picture, chart


def test_the_map_has_the_exact_cosines_and_each_family_together(fleet: Path) -> None:
    picture, chart = family_picture(fleet)
    assert "are exact" in picture.caption
    names = [row.rpartition(" ")[0] for row in chart.rows]  # without their numbers
    assert sorted([*names, "low"]) == sorted(member.name for member in Fleet.open(fleet).members())
    starts = [0, *chart.row_edges, 13]
    for start, end in pairwise(starts):
        assert len({name.partition("-")[0] for name in names[start:end]} - {"<b>bold"}) == 1
    pair = names.index("f1-r0/checkpoint-100"), names.index("f1-r1/checkpoint-200")
    first, second = (loralens.load(fleet / names[i]) for i in pair)
    expected = loralens.similarity(first, second).comparison.cosine
    assert chart.values[pair] == pytest.approx(expected, abs=1e-9)


def test_a_large_map_has_sketches_and_some_of_every_family(fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_page, "ROOM", 7)
    monkeypatch.setattr(fleet_page, "MOST_PAIRS", 1)
    picture, chart = family_picture(fleet)
    assert "by sketches" in picture.caption
    assert (len(chart.rows), list(chart.row_edges)) == (6, [2, 4])
    assert abs(chart.values.diagonal() - 1).max() < 1e-5


def test_adapters_and_a_fleet_exclude_each_other(fleet: Path) -> None:
    with pytest.raises(OptionError, match="exclude each other"):
        loralens.report(fleet / "<b>bold", fleet=fleet)


def test_a_missing_index_writes_no_page(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="there is no index of a fleet"):
        loralens.report(fleet=tmp_path / "nowhere", output=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
