"""Which file a path means."""

import os
from pathlib import Path

import pytest

from loralens.errors import FormatError, LoraLensError, OptionError
from loralens.formats.files.location import NAMES, SUFFIXES, adapter_file, config_beside, is_pickle
from tests.formats.blobs import blob

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
        ([MODEL, "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"], MODEL),
        (
            ["one.safetensors", "README.md", "tokenizer.json", "checkpoint-5/adapter_model.safetensors"],
            "one.safetensors",
        ),
        (["one.safetensors", "one-state/model.safetensors", ".cache/x.safetensors"], "one.safetensors"),
        (["0100_adapters.safetensors", "adapter_config.json", "x/adapters.safetensors"], "0100_adapters.safetensors"),
        (["default/adapter_model.safetensors", "runs/log"], "default/adapter_model.safetensors"),
        (["default/adapter_model.safetensors", "default/adapter_model.bin"], "default/adapter_model.safetensors"),
    ],
)
def test_the_file_in_a_folder(there, meant, tmp_path):
    assert adapter_file(tree(tmp_path, *there)) == tmp_path / meant


@pytest.mark.parametrize(
    ("there", "what"),
    [
        ([], "holds no adapter file"),
        (["a/b/adapter_model.safetensors"], "holds no adapter file"),
        (["a.safetensors", "b.pt"], "several candidates: a.safetensors, b.pt"),
        (["x/adapter_model.bin", "y/adapter_model.bin"], "candidates: x/adapter_model.bin, y/adapter_model.bin"),
        (["one.safetensors", "x/adapter_model.bin"], "several candidates: one.safetensors, x/adapter_model.bin"),
        ([f"{i}.safetensors" for i in range(20)], "14.safetensors, 15.safetensors …"),
    ],
)
def test_a_folder_that_does_not_say(there, what, tmp_path):
    with pytest.raises(FormatError, match=f"{tmp_path}: the folder .*{what}") as caught:
        adapter_file(tree(tmp_path, *there))
    assert "\n  fix: give " in str(caught.value)


def test_every_known_name_is_found(tmp_path):
    for name in (*NAMES, *(f"x{suffix}" for suffix in SUFFIXES)):
        assert adapter_file(tree(tmp_path / name, name)) == tmp_path / name / name


@pytest.mark.parametrize(
    "name",
    ["Ünïcødé-名前-😀", "C:\\Users\\me\\lora", "a:0.7", "-o", "~", "$HOME", "a\nb", "..."],
)
def test_odd_names(name, tmp_path, monkeypatch):
    folder, file = tmp_path / name, tmp_path / f"{name}.safetensors"
    tree(tmp_path, file.name, f"{name}/{MODEL}")
    assert adapter_file(folder) == folder / MODEL
    assert adapter_file(file) == file
    monkeypatch.chdir(tmp_path)
    assert adapter_file(Path(name)) == Path(name) / MODEL


def test_a_name_that_is_not_unicode(tmp_path):
    name = os.fsdecode(b"\xff\xfe.safetensors")
    assert adapter_file(tree(tmp_path, name) / name) == tmp_path / name


@pytest.mark.parametrize("path", ["nothing", "nothing/here", "a/b/c", "a" * 300, "a/" * 3000, "nul\0byte", "\udcff"])
def test_nothing_there(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(LoraLensError, match=r"no such file or folder|File name too long"):
        adapter_file(Path(path))


def test_links(tmp_path):
    tree(tmp_path, "real.safetensors")
    for name, target in (("good", "real.safetensors"), ("gone", "nothing"), ("loop", "loop")):
        (tmp_path / f"{name}.safetensors").symlink_to(target)
    assert adapter_file(tmp_path / "good.safetensors") == tmp_path / "good.safetensors"
    for name in ("gone", "loop"):
        with pytest.raises(OptionError, match="no such file or folder"):
            adapter_file(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("data", "what", "fix"),
    [
        (b"", "is empty", "again"),
        (b"1234567", "7 bytes are too few", "again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "is a Git-LFS pointer", "git lfs pull"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "is an HDF5 file", "extract"),
        (b"<!DOCTYPE html>\n<html>", "is a web page", "log in first"),
        (b"# Adapters\n\nThe files in this folder are", "is a text, not the weights", "leave it out"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page", "log in first"),
    ],
)
def test_no_tensor_file_by_its_first_bytes(data, what, fix, tmp_path):
    with pytest.raises(FormatError) as caught:
        adapter_file(tree(tmp_path, MODEL, data=data))
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
        (["abc"], "abc", "abc"),
        (["abc", "def"], "def", "def"),
        (["abc", "def"], "def\n", "def"),
        (["abc", "def"], None, None),  # which of the two?
        (["abc"], "def", None),  # main is another revision, and not here
        (["abc"], "", None),
        ([], None, None),
    ],
)
def test_a_hub_id(snapshots, main, meant, hub):
    cached(hub, *snapshots, main=main)
    if meant:
        assert adapter_file(Path("org/name")) == hub / HUB / "snapshots" / meant / MODEL
    else:
        with pytest.raises(
            OptionError, match="org/name: no such file or folder, and the local Hub cache has no snapshot"
        ):
            adapter_file(Path("org/name"))


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
        assert adapter_file(Path("org/name")) == place / HUB / "snapshots" / "abc" / MODEL


@pytest.mark.parametrize("path", ["name", "a/org/name", "/org/name", "./org", "org/na me"])
def test_no_hub_id(path, hub):
    cached(hub, "abc")
    with pytest.raises(OptionError) as caught:
        adapter_file(Path(path))
    assert "Hub cache has no snapshot" not in caught.value.what


def test_a_file_in_the_cache_is_a_link_to_a_blob(hub):
    tree(hub, f"{HUB}/blobs/0123")
    (hub / HUB / "snapshots" / "abc").mkdir(parents=True)
    (hub / HUB / "snapshots" / "abc" / MODEL).symlink_to("../../blobs/0123")
    assert adapter_file(Path("org/name")).read_bytes() == EMPTY


@pytest.mark.parametrize("length", [640, 65536 + 640, 131072 + 896])
def test_the_length_of_a_header_does_not_look_like_a_pickle(length: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{" + b" " * (length - 2) + b"}")
    assert not is_pickle(file)
