"""The page of a fleet: what it says, what it refuses, and that hostile names stay text."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens.errors import OptionError
from loralens.verbs.fleets.fleet_verbs import Fleet
from loralens.verbs.pages import fleet_page
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


def test_the_map_has_the_exact_cosines_and_each_family_together(fleet: Path) -> None:
    shown = fleet_page._map_of(Fleet.open(fleet), Fleet.open(fleet).families())
    assert shown is not None
    assert shown.exact
    assert shown.most == 0
    assert sorted([*shown.names, "low"]) == sorted(member.name for member in Fleet.open(fleet).members())
    for start, end in zip(shown.starts, [*shown.starts[1:], 13], strict=True):
        inside = {name.partition("-")[0] for name in shown.names[start:end]} - {"<b>bold"}
        assert len(inside) == 1
    pair = shown.names.index("f1-r0/checkpoint-100"), shown.names.index("f1-r1/checkpoint-200")
    first, second = (loralens.load(fleet / shown.names[i]) for i in pair)
    expected = loralens.similarity(first, second).comparison.cosine
    assert shown.cosines[pair] == pytest.approx(expected, abs=1e-9)


def test_a_large_map_has_sketches_and_some_of_every_family(fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_page, "ROOM", 7)
    monkeypatch.setattr(fleet_page, "MOST_PAIRS", 1)
    shown = fleet_page._map_of(Fleet.open(fleet), Fleet.open(fleet).families())
    assert shown is not None
    assert (len(shown.names), len(shown.starts), shown.most, shown.exact) == (6, 3, 2, False)
    assert abs(shown.cosines.diagonal() - 1).max() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "base"}, "base is for adapters"),
        ({"modules": "*.q_proj"}, "modules is for adapters"),
        ({"activations": "x"}, "activations is for adapters"),
    ],
)
def test_what_is_measured_on_adapters_is_refused(fleet: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        loralens.report(fleet=fleet, **options)  # type: ignore[arg-type]


def test_adapters_and_a_fleet_exclude_each_other(fleet: Path) -> None:
    with pytest.raises(OptionError, match="exclude each other"):
        loralens.report(fleet / "<b>bold", fleet=fleet)


def test_a_missing_index_writes_no_page(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="there is no index of a fleet"):
        loralens.report(fleet=tmp_path / "nowhere", output=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
