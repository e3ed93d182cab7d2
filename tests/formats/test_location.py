"""Which file a path means."""

import os
import pickle
import tempfile
from pathlib import Path

import pytest

from loralens import FormatError, LoraLensError, OptionError
from loralens.formats.files.location import config_beside, is_pickle
from tests.formats.blobs import blob, limits
from tests.formats.files import find_adapter

MODEL = "adapter_model.safetensors"
HUB = "models--org--name"
EMPTY = blob({})


def tree(folder, *paths, data=EMPTY):
    """Files, each with its folders."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    ("there", "meant"),
    [
        ([MODEL], MODEL),
        (["adapter_model.bin"], "adapter_model.bin"),
        (["anything.safetensors"], "anything.safetensors"),
        (["lora.pt"], "lora.pt"),
        ([MODEL, "adapter_model.bin"], MODEL),
        ([MODEL, "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"], MODEL),
        ([MODEL, "other.safetensors", "checkpoint-5/adapter_model.safetensors"], MODEL),
        (
            ["one.safetensors", "README.md", "tokenizer.json", "checkpoint-5/adapter_model.safetensors"],
            "one.safetensors",
        ),
        (["one.safetensors", "one-state/model.safetensors", ".cache/x.safetensors"], "one.safetensors"),
        (["0100_adapters.safetensors", "adapter_config.json", "x/adapters.safetensors"], "0100_adapters.safetensors"),
        (["default/adapter_model.safetensors"], "default/adapter_model.safetensors"),
        (["default/adapter_model.safetensors", "default/adapter_model.bin"], "default/adapter_model.safetensors"),
    ],
)
def test_the_file_in_a_folder(there, meant, tmp_path):
    assert find_adapter(tree(tmp_path, *there)).file == tmp_path / meant


@pytest.mark.parametrize(
    ("there", "what"),
    [
        ([], "holds no adapter file"),
        (["a/b/adapter_model.safetensors"], "holds no adapter file"),
        (["a.safetensors", "b.pt"], "several candidates: a.safetensors, b.pt"),
        (["x/adapter_model.bin", "y/adapter_model.bin"], "candidates: x/adapter_model.bin, y/adapter_model.bin"),
        (["one.safetensors", "x/adapter_model.bin"], "several candidates: one.safetensors, x/adapter_model.bin"),
        (["one.safetensors", "a/b/c/style.safetensors"], "candidates: one.safetensors, a/b/c/style.safetensors"),
        ([f"{i}.safetensors" for i in range(20)], "14.safetensors, 15.safetensors …"),
    ],
)
def test_a_folder_that_does_not_say(there, what, tmp_path):
    with pytest.raises(FormatError, match=f"{tmp_path}: the folder .*{what}") as caught:
        find_adapter(tree(tmp_path, *there))
    assert "\n  fix: give " in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["with space", "Ünïcødé-名前-😀", "C:\\Users\\me\\lora", "a:0.7", "-o", "~", "$HOME", "%41", "*", "a\nb", "..."],
)
def test_odd_names(name, tmp_path, monkeypatch):
    folder, file = tmp_path / name, tmp_path / f"{name}.safetensors"
    tree(tmp_path, file.name, f"{name}/{MODEL}")
    assert find_adapter(folder).file == folder / MODEL
    assert find_adapter(file).file == file
    monkeypatch.chdir(tmp_path)
    assert find_adapter(Path(name)).file == Path(name) / MODEL


@pytest.mark.parametrize("path", ["nothing", "nothing/here", "a/b/c", "a" * 300, "a/" * 3000, "nul\0byte", "\udcff"])
def test_nothing_there(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(LoraLensError, match=r"no such file or folder|File name too long"):
        find_adapter(Path(path))


def test_links(tmp_path):
    tree(tmp_path, "real.safetensors")
    for name, target in (("good", "real.safetensors"), ("gone", "nothing"), ("loop", "loop")):
        (tmp_path / f"{name}.safetensors").symlink_to(target)
    assert find_adapter(tmp_path / "good.safetensors").file == tmp_path / "good.safetensors"
    for name in ("gone", "loop"):
        with pytest.raises(OptionError, match="is a link that leads to nothing or to itself"):
            find_adapter(tmp_path / f"{name}.safetensors")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "self").symlink_to(tmp_path / "folder")
    with limits(5, 1 << 20), pytest.raises(FormatError, match="holds no adapter file"):
        find_adapter(tmp_path / "folder")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path / "pipe.safetensors", Path("/dev/null"), Path("/dev/zero")):
        with limits(5, 1 << 20), pytest.raises(OptionError, match=f"{path}: is not a regular file"):
            find_adapter(path)
    with pytest.raises(FormatError, match="holds no adapter file"):  # the pipe is not even a candidate
        find_adapter(tmp_path)


@pytest.mark.parametrize(
    ("data", "what", "fix"),
    [
        (b"", "is empty", "again"),
        (b"\0\0", "2 bytes are too few", "again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "is a Git-LFS pointer", "git lfs pull"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "is an HDF5 file", "extract"),
        (b"<!DOCTYPE html>\n<html>", "is a web page", "log in first"),
        (b"# Adapters\n\nThe files in this folder are", "is a text, not the weights", "leave it out"),
        ("Über die Gewichte dieses Ordners".encode(), "is a text, not the weights", "leave it out"),
        (b"\n  <HTML lang=en>", "is a web page", "log in first"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page", "log in first"),
    ],
)
def test_no_tensor_file_by_its_first_bytes(data, what, fix, tmp_path):
    with pytest.raises(FormatError) as caught:
        find_adapter(tree(tmp_path, MODEL, data=data))
    assert str(caught.value).startswith(f"{tmp_path / MODEL}: {what}")
    assert fix in caught.value.fix


def test_the_configuration_beside(tmp_path):
    tree(tmp_path, f"a/{MODEL}", f"b/{MODEL}", "adapter_config.json")
    assert config_beside(tmp_path / "a" / MODEL) is None
    tree(tmp_path, "b/adapter_config.json")
    assert config_beside(tmp_path / "b" / MODEL) == tmp_path / "b" / "adapter_config.json"
    (tmp_path / "a" / "adapter_config.json").symlink_to("nothing")  # it should be there: not the same as none
    assert config_beside(tmp_path / "a" / MODEL) == tmp_path / "a" / "adapter_config.json"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub cache in a fresh HF_HOME, and a working folder beside it."""
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home" / "hub"


def cached(hub, *snapshots, main=None):
    for snapshot in snapshots:
        tree(hub, f"{HUB}/snapshots/{snapshot}/{MODEL}")
    if main is not None:
        tree(hub, f"{HUB}/refs/main", data=main.encode())


@pytest.mark.parametrize(
    ("snapshots", "main", "meant"),
    [
        (["abc"], None, "abc"),
        (["abc"], "abc", "abc"),
        (["abc", "def"], "def", "def"),
        (["abc", "def"], "def\n", "def"),
        (["abc", "def"], None, None),  # which of the two?
        (["abc"], "def", None),  # main is another revision, and not here
        (["abc"], "", None),
        ([], None, None),
        ([], "abc", None),
    ],
)
def test_a_hub_id(snapshots, main, meant, hub):
    cached(hub, *snapshots, main=main)
    if meant:
        assert find_adapter(Path("org/name")).file == hub / HUB / "snapshots" / meant / MODEL
    else:
        with pytest.raises(OptionError, match=r"org/name: .*, and the local Hub cache has no snapshot"):
            find_adapter(Path("org/name"))


def test_where_the_hub_cache_is(hub, tmp_path, monkeypatch):
    """The rules of huggingface_hub.constants: HF_HUB_CACHE, HF_HOME/hub, XDG_CACHE_HOME/huggingface/hub, ~/.cache/…"""
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("ROOT", str(tmp_path / "root"))
    settings = [
        (None, None, tmp_path / "me/.cache/huggingface/hub"),
        ("XDG_CACHE_HOME", tmp_path / "xdg", tmp_path / "xdg/huggingface/hub"),
        ("HF_HOME", "~/hf", tmp_path / "me/hf/hub"),
        ("HF_HOME", "$ROOT/hf", tmp_path / "root/hf/hub"),
        ("HF_HUB_CACHE", tmp_path / "direct", tmp_path / "direct"),
    ]
    monkeypatch.delenv("HF_HOME")
    for variable, value, place in settings:  # each one outranks those before it
        if variable:
            monkeypatch.setenv(variable, str(value))
        cached(place, "abc")
        assert find_adapter(Path("org/name")).file == place / HUB / "snapshots" / "abc" / MODEL


def test_a_folder_outranks_the_hub(hub):
    cached(hub, "abc")
    assert find_adapter(tree(Path("org/name"), MODEL)).file == Path("org/name") / MODEL


@pytest.mark.parametrize("path", ["name", "a/org/name", "/org/name", "./org", "org/na me"])
def test_no_hub_id(path, hub):
    cached(hub, "abc")
    with pytest.raises(OptionError) as caught:
        find_adapter(Path(path))
    assert "Hub cache has no snapshot" not in caught.value.what


def test_a_file_in_the_cache_is_a_link_to_a_blob(hub):
    tree(hub, f"{HUB}/blobs/0123")
    (hub / HUB / "snapshots" / "abc").mkdir(parents=True)
    (hub / HUB / "snapshots" / "abc" / MODEL).symlink_to("../../blobs/0123")
    assert find_adapter(Path("org/name")).file.read_bytes() == EMPTY


@pytest.fixture
def nobody():
    """A folder of our own, seen by a user who may read nothing in it that is not said so."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        if os.geteuid():
            yield folder
            return
        os.chown(folder, 65534, -1)
        os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(0)


def test_no_permission(nobody):
    tree(nobody, f"file/{MODEL}", f"folder/{MODEL}", f"outer/inner/{MODEL}", "config/adapter_config.json")
    for path, mode in (
        (nobody / "file" / MODEL, 0o000),
        (nobody / "folder", 0o000),
        (nobody / "outer", 0o000),
    ):
        path.chmod(mode)
    for path in ("file", f"file/{MODEL}", "folder", f"folder/{MODEL}", "outer/inner", f"outer/inner/{MODEL}"):
        with pytest.raises(FormatError, match="cannot be opened: Permission denied"):
            find_adapter(nobody / path)
    for path in ("folder", "outer"):
        (nobody / path).chmod(0o755)


@pytest.mark.parametrize("length", [640, 65536 + 640, 131072 + 896])
def test_the_length_of_a_header_does_not_look_like_a_pickle(length: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{" + b" " * (length - 2) + b"}")
    assert not is_pickle(file)


def test_a_pickle_is_one_by_its_first_bytes(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    assert is_pickle(file)


def test_what_was_found_is_not_looked_for_again(tmp_path: Path) -> None:
    found = find_adapter(tree(tmp_path / "a", MODEL) / MODEL)
    (tmp_path / "a").rename(tmp_path / "b")
    assert find_adapter(found) is found
    assert str(found) == os.fspath(found) == str(tmp_path / "a" / MODEL)
