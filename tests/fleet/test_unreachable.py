"""Folders that cannot be listed and disks that are not mounted: their adapters are kept, not forgotten."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import loralens
from loralens.formats.files import outside as walking
from tests.fleet.makers import indexed, save_many


@pytest.fixture
def fleet(tmp_path: Path) -> loralens.Fleet:
    save_many(tmp_path / "fleet" / "open", 2)
    save_many(tmp_path / "fleet" / "secret" / "deep", 2)
    return indexed(tmp_path / "fleet")


@pytest.fixture
def closed(fleet: loralens.Fleet, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose permission is missing, also where the tests run as root, to whom everything is permitted."""
    folder = fleet.root / "secret"
    folder.chmod(0)
    if os.access(folder, os.R_OK):
        scandir = os.scandir

        def refuse(path: object) -> object:
            if str(path) == str(folder):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return scandir(path)  # type: ignore[call-overload]

        monkeypatch.setattr(walking.os, "scandir", refuse)
    yield folder
    folder.chmod(0o755)


def names(fleet: loralens.Fleet) -> list[str]:
    return [member.name for member in fleet.members()]


def test_a_folder_that_cannot_be_listed_keeps_its_adapters(
    fleet: loralens.Fleet, closed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names(fleet)
    result = fleet.update()
    assert names(fleet) == before
    assert not [change for change in result.changes if change.change == "gone"]
    assert [(file.name, file.reason) for file in result.unreadable] == [
        ("secret", "this folder cannot be listed: Permission denied")
    ]
    assert result.unreadable[0].fix
    assert {path.parent.name for path in result.unreachable} == {"a000", "a001"}
    assert result.conclusion()[1] == "2 adapters could not be reached, and are kept as before."
    # Nothing has changed since, and nothing is told twice.
    assert not fleet.changes()
    assert not fleet.update().changes
    closed.chmod(0o755)
    monkeypatch.undo()
    assert fleet.changes() == {"gone": 1}
    assert [change.path for change in fleet.update().changes] == ["secret"]
    assert not fleet.unreadable()


def test_an_emptied_root_is_refused(tmp_path: Path) -> None:
    save_many(tmp_path / "disk", 3)
    fleet = indexed(tmp_path / "disk", tmp_path / "index")
    shutil.move(tmp_path / "disk", tmp_path / "elsewhere")
    (tmp_path / "disk").mkdir()
    for root in (None, tmp_path / "disk"):
        with pytest.raises(loralens.OptionError, match="is empty, and the index has 3 adapters") as caught:
            fleet.update(root)
        assert str(tmp_path / "index") in caught.value.fix
    assert len(fleet.members()) == 3
    (tmp_path / "disk").rmdir()
    shutil.move(tmp_path / "elsewhere", tmp_path / "disk")
    assert not fleet.update().changes
