"""What stands under a folder: adapters, what should be one, and whole models."""

import os
import shutil
from pathlib import Path

import pytest

import loralens
from loralens import OptionError
from loralens.formats.records.collection import candidates


def test_a_folder_that_lacks_its_weights_is_itself_unreadable(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert [entry.path for entry in loralens.survey(tmp_path).unreadable] == [tmp_path]


def test_only_a_folder_can_be_looked_through(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is not a folder"):
        candidates(tmp_path / "nowhere")
    assert candidates(tmp_path) == []


def test_links_to_folders_are_followed_once(small: Path, tmp_path: Path) -> None:
    """Into the folder, out of it, to what is there already, around in a circle, and nowhere."""
    outside, root = tmp_path / "outside", tmp_path / "root"
    for place in (outside / "far", root / "own"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir()
        for file in small.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
    (root / "all").symlink_to(outside)
    (root / "again").symlink_to(root / "own")
    (root / "a-far").symlink_to(outside / "far")
    (root / "loop").symlink_to(root)
    (root / "nowhere").symlink_to(root / "none")
    (outside / "back").symlink_to(root)
    links: list[Path] = []
    found = [path.relative_to(root) for path in candidates(root, linked=links.append)]
    # Every link to a folder, also one behind a link; links to files and to nothing are not among them.
    assert {str(link.relative_to(root)) for link in links} == {"all", "all/back", "again", "a-far", "loop"}
    assert found == [Path("a-far/adapter_model.safetensors"), Path("own/adapter_model.safetensors")]


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs /proc")
def test_links_into_proc_are_not_followed(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a link to the working folder of every program, so that the whole machine would be looked through."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "proc").symlink_to("/proc")
    (tmp_path / "root" / "self").symlink_to(f"/proc/{os.getpid()}")
    shutil.copytree(small, tmp_path / "elsewhere" / "adapter")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert candidates(tmp_path / "root") == []
