"""A changed copy of a model: what changes, what does not, and that it is whole or not there."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from loralens import FormatError, OptionError
from loralens.formats.files import atomic
from loralens.formats.models.model_writer import Change, CopyOptions, write_model
from tests.bases import contents, sharded, single, stored, tensors
from tests.formats.files import model_files, read_safetensors

KEY = "model.layers.0.self_attn.q_proj.weight"
NEW = np.arange(24, dtype=np.float32).reshape(6, 4)


def write(root: Path, target: Path, *, dtype=None, changes=None, fill=None, **options) -> None:
    files = model_files(root)
    spec = Change(np.dtype(dtype or files.tensors[KEY].dtype), (6, 4))
    rows = fill or (lambda key: iter([NEW[:2].astype(spec.dtype), NEW[2:].astype(spec.dtype)]))
    write_model(files, target, changes={KEY: spec, **(changes or {})}, fill=rows, options=CopyOptions(**options))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("make", [single, sharded])
def test_one_tensor_changes_and_every_other_byte_stays(make, threads: int, tmp_path: Path) -> None:
    root = make(tmp_path / "m", tensors())
    write(root, tmp_path / "out", threads=threads)
    before, after = contents(root), contents(tmp_path / "out")
    assert list(before) == list(after)
    found = stored(tmp_path / "out")
    for key, array in stored(root).items():
        np.testing.assert_array_equal(found[key], NEW.astype(array.dtype) if key == KEY else array)
    different = [name for name in before if before[name] != after[name]]
    assert len(different) == 1
    a, b = before[different[0]], after[different[0]]
    assert sum(x != y for x, y in zip(a, b, strict=True)) <= 48


def test_another_dtype_moves_what_follows_and_the_index_says_the_size(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m", tensors())
    write(root, tmp_path / "out", dtype=np.float32)
    found = stored(tmp_path / "out")
    np.testing.assert_array_equal(found[KEY], NEW)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(array.nbytes for array in found.values()), "x": 1}


def test_keys_come_and_go(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m", tensors())
    new = {"extra.weight": Change(np.dtype(np.float16), (3,))}
    rows = {KEY: NEW.astype(tensors()[KEY].dtype), "extra.weight": np.ones(3, np.float16)}
    write(root, tmp_path / "out", changes=new, fill=lambda key: iter([rows[key]]), dropped=["lm_head.weight"])
    found = stored(tmp_path / "out")
    assert set(found) == {*tensors(), "extra.weight"} - {"lm_head.weight"}
    names = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(names) == set(found)
    for key, name in names.items():
        assert key in read_safetensors(tmp_path / "out" / name).tensors


def test_copied_rows_are_seen_in_order(tmp_path: Path) -> None:
    seen: dict[str, list] = {}
    root = single(tmp_path / "m", tensors() | {"big": np.arange(600_000, dtype=np.float32).reshape(-1, 3)})
    write(root, tmp_path / "out", watch=lambda key, rows: seen.setdefault(key, []).append(rows.copy()), threads=2)
    assert set(seen) == {*tensors(), "big"} - {KEY}
    assert len(seen["big"]) > 1
    np.testing.assert_array_equal(np.concatenate(seen["big"]), stored(root)["big"])


def test_texts_names_and_what_does_not_come_along(tmp_path: Path) -> None:
    root = single(tmp_path / "m", tensors())
    (root / "a.txt").write_text("a")
    (root / "b.txt").write_text("b")
    write(
        root, tmp_path / "out", texts={"config.json": "{}"}, without=["a.txt"], names={"b.txt": "in/c.txt"},
        write_beside=lambda part: (part / "d.txt").write_text("d"),
    )  # fmt: skip
    after = contents(tmp_path / "out")
    assert set(after) == {"config.json", "d.txt", "in/c.txt", "model.safetensors", "tokenizer.json"}
    assert (after["config.json"], after["in/c.txt"]) == (b"{}", b"b")


def test_a_whole_header_may_be_given(tmp_path: Path) -> None:
    root = single(tmp_path / "m", tensors())
    header = model_files(root).shards[0].header
    write(root, tmp_path / "wide", dtype=np.float32)
    write(tmp_path / "wide", tmp_path / "back", dtype=tensors()[KEY].dtype, headers={"model.safetensors": header})
    assert (tmp_path / "back" / "model.safetensors").read_bytes().startswith(header)
    for wrong in (
        header.replace(b"BF16", b"XXXX"),
        header.replace(b"[5,4]", b"[4,5]"),
        b"\2" + bytes(7) + b"[]",
    ):
        with pytest.raises(FormatError, match="header"):
            write(tmp_path / "wide", tmp_path / "x", dtype=tensors()[KEY].dtype, headers={"model.safetensors": wrong})


def clean(tmp_path: Path) -> bool:
    return not any(".part" in path.name or ".old" in path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [FormatError("x", fix="y"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")]
)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_half_way_leaves_nothing_behind(error, threads: int, overwrite: bool, tmp_path: Path) -> None:
    root = sharded(tmp_path / "m", tensors())
    if overwrite:
        write(root, tmp_path / "out")
    before, running = contents(tmp_path), threading.active_count()

    def fill(key):
        yield NEW[:2].astype(tensors()[key].dtype)
        raise error

    expected = FormatError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        write(root, tmp_path / "out", fill=fill, threads=threads, overwrite=overwrite)
    if isinstance(error, OSError):
        assert "out: cannot be written: No space left" in str(caught.value)
    assert contents(tmp_path) == before
    assert clean(tmp_path)
    assert threading.active_count() == running


def test_a_full_disk_is_seen_before_the_first_byte(tmp_path: Path, monkeypatch) -> None:
    root = single(tmp_path / "m", tensors())
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(FormatError, match=r"it takes \d+ bytes, but the disk has 1 left") as error:
        write(root, tmp_path / "out")
    assert str(error.value).count(str(tmp_path / "out")) == 1
    assert clean(tmp_path)


def test_a_target_that_another_process_has_written_meanwhile_stays(tmp_path: Path) -> None:
    root, target = single(tmp_path / "m", tensors()), tmp_path / "out"

    def fill(key: str):
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"theirs")
        yield NEW.astype(np.float16)

    with pytest.raises(OptionError, match="another run has written there meanwhile"):
        write(root, target, fill=fill)
    assert contents(target) == {"model.safetensors": b"theirs"}


@pytest.mark.parametrize("make", [single, sharded])
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks Linux which file a number stands for")
def test_all_of_it_is_on_the_disk_before_it_takes_its_place(make, tmp_path: Path, monkeypatch) -> None:
    root, order = make(tmp_path / "m", tensors()), []
    fsync, rename = os.fsync, Path.replace

    def syncing(fd):
        order.append(("sync", str(Path(f"/proc/self/fd/{fd}").readlink())))
        fsync(fd)

    def renaming(self, target):
        order.append(("rename", str(target)))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "replace", renaming)
    write(root, tmp_path / "out", write_beside=lambda part: (part / "more.json").write_text("{}"))
    at = order.index(("rename", str(tmp_path / "out")))
    synced = {Path(path).name for what, path in order[:at] if what == "sync"}
    assert {Path(name).name for name in contents(tmp_path / "out")} <= synced
    assert any(name.endswith(".part") for name in synced)  # the folder that holds their names
    assert order[at + 1 :] == [("sync", str(tmp_path))]
