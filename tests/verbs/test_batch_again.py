"""A batch that is repeated: what exists is skipped, whatever made it, and is made again only if that was asked for."""

import shutil
from pathlib import Path
from typing import Any

import pytest

import loralens
from loralens import OptionError
from loralens.formats.files.disk import Hold
from tests.verbs.batches import files_under, lay_adapters, statuses

SKIPPED = {"a": "exists", "b": "exists"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two trained adapters in ``all``, scaled by a half into ``out``."""
    monkeypatch.chdir(tmp_path)
    lay_adapters(tmp_path / "all", "20newsgroups-r8-seed0", "reuters-r8-r8-seed0")
    assert statuses(scale()) == {"a": "written", "b": "written"}
    return tmp_path


def scale(by: float = 0.5, **options: Any) -> Any:
    return loralens.scale("all", by, output="out", **options)


def test_what_exists_is_skipped_whatever_made_it(folder: Path) -> None:
    before = files_under(folder)
    again = scale()
    assert statuses(again) == SKIPPED
    assert [(row.answer, row.numbers) for row in again] == [(None, None)] * 2
    assert again.answer
    assert "--overwrite" in " ".join(again.conclusion())
    assert statuses(scale(0.25)) == statuses(loralens.compress("all", rank=4, output="out", jobs=2)) == SKIPPED
    assert files_under(folder) == before


@pytest.mark.parametrize("jobs", [1, 2])
def test_overwrite_makes_it_again(jobs: int, folder: Path) -> None:
    (folder / "out/a/README.md").write_text("mine")
    assert statuses(scale(0.25, overwrite=True, dry_run=True, jobs=jobs)) == {"a": "done", "b": "done"}
    assert statuses(scale(0.25, overwrite=True, jobs=jobs)) == {"a": "written", "b": "written"}
    assert loralens.equal(loralens.load("out/a"), loralens.scale("all/a", 0.25).adapter).answer
    assert (folder / "out/a/README.md").read_text() == "mine"


def test_a_folder_without_weights_is_no_output(folder: Path) -> None:
    for name, kept in (("a", "README.md"), ("b", "adapter_config.json")):
        shutil.rmtree(folder / "out" / name)
        (folder / "out" / name).mkdir()
        (folder / "out" / name / kept).write_text("mine")
    result = scale()
    assert statuses(result) == {"a": "written", "b": "failed"}
    assert "exists" in result[1].reason
    assert (folder / "out/a/README.md").read_text() == (folder / "out/b/adapter_config.json").read_text() == "mine"


def test_what_a_killed_run_has_moved_aside_is_restored_and_skipped(folder: Path) -> None:
    before = files_under(folder)
    (folder / "out/a").rename(folder / "out/.a.old")
    (folder / "out/.b.part").mkdir()
    assert statuses(scale()) == SKIPPED
    assert files_under(folder) == before
    assert not list((folder / "out").glob(".*"))


def test_two_runs_do_not_write_into_one_folder(folder: Path) -> None:
    hold = Hold()
    hold.take(folder / "out")
    with pytest.raises(OptionError, match="a run is going on"):
        scale()
    hold.release()
    assert statuses(scale()) == SKIPPED
