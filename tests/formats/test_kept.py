"""Files outside a model's folder stay those of the model that stands there."""

import os
from pathlib import Path

import pytest

from loralens.formats.records.kept import keep_files, restore_kept


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "undo").write_text("old")
    return tmp_path


def replaced(path: Path) -> None:
    """Another folder takes its place, as when a model is written."""
    (path.parent / "new").mkdir()
    path.rename(path.parent / "aside")
    (path.parent / "new").rename(path)
    (path.parent / "aside").rmdir()


def written(path: Path) -> None:
    path.with_name("part").write_text("new")
    path.with_name("part").replace(path)


def names(home: Path) -> set[str]:
    return {path.name for path in home.iterdir()}


@pytest.mark.parametrize("linked", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("swapped", [True, False], ids=["another model", "the same model"])
@pytest.mark.parametrize("ends", [True, False], ids=["well", "by an error"])
def test_the_file_is_that_of_the_model(linked: bool, swapped: bool, ends: bool, home: Path, monkeypatch) -> None:
    def refused(*_: object) -> None:
        raise OSError

    if not linked:
        monkeypatch.setattr(os, "link", refused)
    undo, model = home / "undo", home / "model"
    try:
        with keep_files([undo], model):
            assert undo.read_text() == "old"
            written(undo)
            if swapped:
                replaced(model)
            if not ends:
                raise RuntimeError
    except RuntimeError:
        pass
    assert undo.read_text() == ("new" if swapped else "old")
    assert names(home) == {"undo", "model"}


def test_what_a_killed_run_kept(home: Path) -> None:
    undo, model = home / "undo", home / "model"
    dead = 2**22 + 1  # no process has this number
    hidden = home / f".undo.{dead}.{model.stat().st_ino}.kept"
    hidden.write_text("older")
    restore_kept(home / "another", model)
    assert undo.read_text() == "old"
    restore_kept(undo, model)
    assert undo.read_text() == "older"
    hidden.write_text("oldest")
    replaced(model)
    restore_kept(undo, model)
    assert undo.read_text() == "older"
    assert names(home) == {"undo", "model"}


def test_what_a_run_keeps_at_this_moment_is_nobody_else_s(home: Path) -> None:
    with keep_files([home / "undo"], home / "model"):
        before = names(home)
        restore_kept(home / "undo", home / "model")
        assert names(home) == before
        assert len(before) == 3


def test_a_link_of_such_a_name_is_left_alone(home: Path) -> None:
    (home / "secret").write_text("secret")
    (home / f".undo.4194305.{(home / 'model').stat().st_ino}.kept").symlink_to(home / "secret")
    restore_kept(home / "undo", home / "model")
    assert (home / "undo").read_text() == "old"


def test_nothing_is_kept_where_nothing_stands(home: Path) -> None:
    with keep_files([home / "undo", home / "absent"], home / "no model"):
        assert names(home) == {"undo", "model"}
    with keep_files([home / "absent"], home / "model"):
        assert names(home) == {"undo", "model"}
