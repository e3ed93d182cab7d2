"""``loralens unmerge``: the base back bit for bit, last merge first; anything else is an error and writes nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from loralens.core import LazyArray
from loralens.formats.records.merged_files import NAME, read_undo, write_undo
from tests.bases import contents, sharded, tensors
from tests.cli.test_merge import done, refused, told
from tests.conftest import small_adapter


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return sharded(tmp_path / "base", tensors(size=2.0))


@pytest.fixture
def out(small: Path, base: Path, tmp_path: Path) -> Path:
    done("merge", small, "--base", base, "-o", tmp_path / "out")
    return tmp_path / "out"


def test_every_file_of_the_base_comes_back(base: Path, out: Path, tmp_path: Path) -> None:
    result = done("unmerge", out, "-o", tmp_path / "back")
    assert result.stdout.splitlines() == [
        f"Wrote {tmp_path / 'back'}: the base of {out}, bit for bit.",
        "",
        "6 tensors restored, the SHA-256 of each checked",
        "",
    ]
    assert contents(tmp_path / "back") == contents(base)
    record = told("unmerge", out, "-o", tmp_path / "two")
    assert record == {
        "loralens": loralens.__version__,
        "merged": str(out),
        "output": str(tmp_path / "two"),
        "exact": True,
        "tensors": 6,
    }


def test_several_merges_are_undone_last_first(small: Path, base: Path, out: Path, tmp_path: Path) -> None:
    for number, strength in ((1, 0.3), (2, -0.7)):
        before = tmp_path / ("out" if number == 1 else "out1")
        done("merge", f"{small}:{strength}", "--base", before, "-o", tmp_path / f"out{number}")
    said = refused("unmerge", tmp_path / "out2", "-o", tmp_path / "back", "--undo", out / NAME)
    assert "is not as it was merged" in said
    assert "if adapters were merged later, unmerge them first" in said
    assert not (tmp_path / "back").exists()
    for number in (2, 1):
        done("unmerge", tmp_path / f"out{number}", "-o", tmp_path / f"back{number}")
        assert contents(tmp_path / f"back{number}") == contents(tmp_path / ("out" if number == 1 else "out1"))
    done("unmerge", tmp_path / "back1", "-o", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def spoilt(how: str, out: Path) -> str:
    """Do something to a merged folder; what must be said of it."""
    shard = out / "model-00001-of-00003.safetensors"
    held = load_file(shard)
    if how == "adapted":
        key = next(key for key in held if "proj" in key)
    elif how == "copied":
        key = next(key for key in held if "proj" not in key)
    elif how == "shorter":
        del held[next(key for key in held if "proj" in key)]
        save_file(held, shard, metadata={"format": "pt"})
        return "which was merged"
    else:
        undo = out / NAME
        data = bytearray(undo.read_bytes())
        data[-7] ^= 0x55  # the end of the last array
        undo.write_bytes(data)
        return ""
    held[key] = held[key].copy()
    held[key].flat[0] *= 2
    save_file(held, shard, metadata={"format": "pt"})
    return "is not as it was merged"


@pytest.mark.parametrize("how", ["adapted", "copied", "shorter", "undo"])
def test_a_change_is_an_error_and_nothing_is_written(how: str, out: Path, tmp_path: Path) -> None:
    message = spoilt(how, out)
    before = set(tmp_path.rglob("*"))
    said = refused("unmerge", out, "-o", tmp_path / "back")
    assert message in said
    assert "fix: " in said
    assert set(tmp_path.rglob("*")) == before


def test_subtracting_says_what_it_cannot_know(small: Path, base: Path, out: Path, tmp_path: Path) -> None:
    (out / NAME).unlink()
    result = done("unmerge", out, "-o", tmp_path / "back", "--adapter", small)
    assert "6 tensors subtracted" in result.stdout
    assert " of 144 entries could have come from several weights." in result.stdout
    record = told("unmerge", out, "-o", tmp_path / "two", "--adapter", small)
    assert set(record) == {"loralens", "merged", "output", "exact", "tensors", "entries", "several", "none"}
    assert (record["exact"], record["entries"], record["none"]) == (False, 144, 0)
    wrong = 0
    for file in sorted(base.glob("*.safetensors")):
        for key, W in load_file(file).items():
            wrong += np.count_nonzero(load_file(tmp_path / "back" / file.name)[key] != W)
    assert wrong <= record["several"]
    other = small_adapter().map(lambda m: loralens.LowRank(m.B * 3.7, m.A, m.scale))
    loralens.save(other, tmp_path / "wrong")
    result = done("unmerge", out, "-o", tmp_path / "three", "--adapter", tmp_path / "wrong")
    assert "144" in result.stdout


def test_what_was_replaced_cannot_be_subtracted(base: Path, tmp_path: Path) -> None:
    from loralens.core.adapter import Extra
    from loralens.core.lazy import LazyArray

    extra = {"base_model.model.lm_head.weight": Extra("saved", "lm_head", LazyArray.of(np.ones((5, 4), np.float32)))}
    one = loralens.Adapter(modules=small_adapter().modules, extra=extra)
    loralens.save(one, tmp_path / "adapter")
    done("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out")
    assert "lm_head.weight was replaced or scaled (DoRA) by the merge" in refused(
        "unmerge", tmp_path / "out", "-o", tmp_path / "back", "--adapter", tmp_path / "adapter"
    )
    done("unmerge", tmp_path / "out", "-o", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def tampered(out: Path, change) -> None:
    """The undo file in a merged model with another record, its digest made anew; its tensors stay."""
    arrays, content = read_undo(out / NAME)
    arrays = {key: LazyArray.of(array.read()) for key, array in arrays.items()}
    change(content)
    content.pop("digest", None)  # whoever changes the one changes the other
    write_undo(arrays.items, content.items, out / NAME)


@pytest.mark.parametrize("part", ["texts", "headers"])
def test_a_damaged_text_of_an_undo_file_is_noticed(part: str, out: Path, tmp_path: Path) -> None:
    arrays, content = read_undo(out / NAME)
    arrays = {key: LazyArray.of(array.read()) for key, array in arrays.items()}
    name, text = next(iter(content[part].items()))
    content[part][name] = text.replace("t", "T", 1)
    write_undo(arrays.items, content.items, out / NAME)
    assert "do not match their digest" in refused("unmerge", out, "-o", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.some(7)
@pytest.mark.parametrize(
    "name",
    [
        "../escaped",
        "ABS",
        "",
        "tokenizer.json",
        NAME,
        "config.json/x",
    ],
)
def test_an_undo_file_replaces_nothing_but_what_a_merge_changes(name: str, out: Path, tmp_path: Path) -> None:
    name = str(tmp_path / "escaped") if name == "ABS" else name
    tampered(out, lambda content: content["texts"].update({name: "harm"}))
    before = {path: contents(path) for path in tmp_path.iterdir()}
    said = refused("unmerge", out, "-o", tmp_path / "back")
    assert f"it would replace {name!a}, which no merge changes" in said
    assert said.count("\n") == 2
    assert {path: contents(path) for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["../elsewhere/model.safetensors", "/abs.safetensors", ".."])
def test_an_index_of_an_undo_file_names_no_other_place(name: str, out: Path, tmp_path: Path) -> None:
    def change(content) -> None:
        index = json.loads(content["texts"]["model.safetensors.index.json"])
        index["weight_map"]["lm_head.weight"] = name
        content["texts"]["model.safetensors.index.json"] = json.dumps(index)

    tampered(out, change)
    assert f"index.json names {name!a}, which is not a plain file name" in refused(
        "unmerge", out, "-o", tmp_path / "back"
    )
    assert not (tmp_path / "back").exists()


def test_a_link_in_the_merged_model_is_followed_and_never_written_through(
    out: Path, base: Path, tmp_path: Path
) -> None:
    config, blob = out / "config.json", tmp_path / "blob"
    config.rename(blob)
    config.symlink_to(blob)
    before = blob.read_bytes()
    tampered(out, lambda content: content["texts"].update({"config.json": (base / "config.json").read_text()}))
    done("unmerge", out, "-o", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)
    assert not (tmp_path / "back" / "config.json").is_symlink()
    assert blob.read_bytes() == before
