"""Names that come out of files: one rule, and nothing is written outside of the folder that it is meant for."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from loralens import FormatError
from loralens.formats.files.location import snapshot
from loralens.formats.files.outside import check_relative_name, is_relative_name, path_to_write
from loralens.formats.models.model_files import weight_files
from loralens.formats.models.model_writer import CopyOptions, write_model
from tests.bases import sharded, single, tensors
from tests.formats.files import model_files

PLAIN = [
    "a",
    "a.b",
    "a b",
    ".hidden",
    "...",
    "..a",
    "a/b/c",
    "é/名前",
    "model:latest",
    "-rf",
    "~",
    "a\nb",
    "a" * 255,
    "a\udc80",
]
ODD = [
    "", ".", "..", "/", "/etc/passwd", "../x", "a/../../x", "a/..", "a/.", "./a", "a//b", "a/", "\\x", "a\\..\\..\\x",
    "a\0b", "C:x", "c:/x", "C:", "a/C:x", "//host/share/x", "\\\\host\\share", "..\\x",
    "a" * 256, "é" * 128, "a/" * 600 + "a", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_plain_names(name: str, tmp_path: Path) -> None:
    assert is_relative_name(name)
    check_relative_name(name, fix="")
    assert path_to_write(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", [*ODD, None, 3, b"a", ["a"]])
def test_names_that_mean_another_place(name: object, tmp_path: Path) -> None:
    assert not is_relative_name(name)
    with pytest.raises(FormatError, match="is not the relative path of a file within the folder"):
        path_to_write(tmp_path, name)  # type: ignore[arg-type]


@given(st.lists(st.sampled_from(["..", ".", "", "a", "b", "/", "\\", "C:", "\0"]), max_size=6).map("/".join))
def test_an_accepted_name_lies_below_its_folder(name: str) -> None:
    if is_relative_name(name):
        folder = Path("/nowhere/folder")
        assert folder in (folder / name).resolve().parents


@pytest.mark.parametrize("name", ["link/x", "sub/link/x", "link", "dangling", "sub/file"])
def test_no_part_of_what_is_written_is_a_link(name: str, tmp_path: Path) -> None:
    """A link within the folder is one too: it says that something else was there first."""
    folder = tmp_path / "new"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (folder / "link").symlink_to("../elsewhere")
    (folder / "sub" / "link").symlink_to("../../elsewhere")
    (folder / "dangling").symlink_to("../nothing")
    (folder / "sub" / "file").symlink_to("other")
    with pytest.raises(FormatError, match="leads out of the folder by a link"):
        path_to_write(folder, name)


def test_the_folder_itself_may_be_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert path_to_write(tmp_path / "link", "a/b") == tmp_path / "link" / "a" / "b"


@pytest.mark.parametrize("name", [*ODD, "sub/model.safetensors"])
def test_an_index_names_files_of_its_own_folder(name: str, tmp_path: Path) -> None:
    save_file({"x": np.ones(2)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    save_file({"x": np.ones(2)}, folder / "sub" / "model.safetensors")
    index = {"weight_map": {"x": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"index.json names '.*, which is not a plain file name"):
        weight_files(folder)


def test_links_of_a_folder_that_is_read_are_followed(tmp_path: Path) -> None:
    """A snapshot in the cache of the Hub consists of links to blobs; the copy has files."""
    base = sharded(tmp_path / "base", tensors())
    blobs, snap = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snap.mkdir(parents=True)
    for number, file in enumerate(sorted(base.iterdir())):
        file.rename(blobs / str(number))
        (snap / file.name).symlink_to(f"../../blobs/{number}")
    write_model(model_files(snap), tmp_path / "out", changes={}, fill=lambda _: iter(()))
    written = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in written] == sorted(path.name for path in snap.iterdir())
    assert all(path.is_file() and not path.is_symlink() for path in written)
    assert all(path.read_bytes() == (snap / path.name).read_bytes() for path in written)


@pytest.mark.parametrize("name", ["../x", "a\\b"])
@pytest.mark.parametrize("which", ["texts", "names"])
def test_a_copy_of_a_model_stays_in_its_folder(which: str, name: str, tmp_path: Path) -> None:
    base = single(tmp_path / "base", tensors())
    named = {"texts": {name: "x"}, "names": {"tokenizer.json": name}}[which]
    options = CopyOptions(**{which: named})  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="is not the relative path"):
        write_model(model_files(base), tmp_path / "out", changes={}, fill=lambda _: iter(()), options=options)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("revision", ["../../elsewhere", "/etc", ".", "a\0b"])
def test_a_reference_of_the_hub_cache_is_a_name_too(revision: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "models--a--b"
    (folder / "refs").mkdir(parents=True)
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    assert snapshot(folder) is None
    (folder / "refs" / "main").write_text("abc\n")
    assert snapshot(folder) == folder / "snapshots" / "abc"
