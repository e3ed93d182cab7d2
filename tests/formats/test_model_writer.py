"""A changed copy of a model: what changes, what does not, and that it is whole or not there."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from loralens.errors import FormatError, OptionError
from loralens.formats.files import atomic, disk
from loralens.formats.files.container import read_safetensors
from loralens.formats.files.hold import lock
from loralens.formats.models import model_writer
from loralens.formats.models.model_files import model_files
from loralens.formats.models.model_writer import Change, write_model
from tests.bases import contents, sharded, single, tensors

KEY = "model.layers.0.self_attn.q_proj.weight"
NEW = np.arange(24, dtype=np.float32).reshape(6, 4)


def write(root: Path, target: Path, *, dtype=None, changes=None, fill=None, **options) -> None:
    files = model_files(root)
    spec = Change(np.dtype(dtype or files.tensors[KEY].dtype), (6, 4))
    rows = fill or (lambda key: iter([NEW[:2].astype(spec.dtype), NEW[2:].astype(spec.dtype)]))
    write_model(files, target, changes={KEY: spec, **(changes or {})}, fill=rows, **options)


def held(folder: Path) -> dict:
    return {
        key: tensor.read()
        for file in sorted(folder.glob("*.safetensors"))
        for key, tensor in read_safetensors(file).tensors.items()
    }


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("make", [single, sharded])
def test_one_tensor_changes_and_every_other_byte_stays(make, threads: int, tmp_path: Path) -> None:
    root = make(tmp_path / "m", tensors())
    write(root, tmp_path / "out", threads=threads)
    before, after = contents(root), contents(tmp_path / "out")
    assert list(before) == list(after)
    found = held(tmp_path / "out")
    for key, array in held(root).items():
        np.testing.assert_array_equal(found[key], NEW.astype(array.dtype) if key == KEY else array)
    different = [name for name in before if before[name] != after[name]]
    assert len(different) == 1
    a, b = before[different[0]], after[different[0]]
    assert sum(x != y for x, y in zip(a, b, strict=True)) <= 48


def test_another_dtype_moves_what_follows_and_the_index_says_the_size(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m", tensors())
    write(root, tmp_path / "out", dtype=np.float32)
    found = held(tmp_path / "out")
    np.testing.assert_array_equal(found[KEY], NEW)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(array.nbytes for array in found.values()), "x": 1}


def test_an_index_may_name_what_no_shard_holds(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m", tensors())
    file = root / "model.safetensors.index.json"
    index = {**json.loads(file.read_text()), "metadata": None}
    index["weight_map"]["ghost.weight"] = index["weight_map"][KEY]
    file.write_text(json.dumps(index))
    write(root, tmp_path / "same")
    assert (tmp_path / "same" / file.name).read_bytes() == file.read_bytes()
    write(root, tmp_path / "wide", dtype=np.float32)
    after = json.loads((tmp_path / "wide" / file.name).read_text())
    assert after["weight_map"] == index["weight_map"]
    assert after["metadata"] == {"total_size": sum(array.nbytes for array in held(tmp_path / "wide").values())}


def test_an_index_that_still_fits_keeps_its_bytes(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m", tensors())
    file = root / "model.safetensors.index.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    write(root, tmp_path / "out")
    assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_keys_come_and_go(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m", tensors())
    new = {"extra.weight": Change(np.dtype(np.float16), (3,))}
    rows = {KEY: NEW.astype(tensors()[KEY].dtype), "extra.weight": np.ones(3, np.float16)}
    write(root, tmp_path / "out", changes=new, fill=lambda key: iter([rows[key]]), dropped=["lm_head.weight"])
    found = held(tmp_path / "out")
    assert set(found) == {*tensors(), "extra.weight"} - {"lm_head.weight"}
    names = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(names) == set(found)
    for key, name in names.items():
        assert key in read_safetensors(tmp_path / "out" / name).tensors


def test_a_new_key_goes_to_its_own_component(tmp_path: Path) -> None:
    for name in ("unet", "vae"):
        single(tmp_path / "p" / name, {"x": np.ones(2, np.float32)}, name="diffusion_pytorch_model.safetensors")
    changes = {"unet.y": Change(np.dtype(np.float32), (2,))}
    write_model(
        model_files(tmp_path / "p"), tmp_path / "out", changes=changes, fill=lambda key: iter([np.zeros(2, np.float32)])
    )
    for name, keys in (("unet", {"x", "y"}), ("vae", {"x"})):
        assert set(held(tmp_path / "out" / name)) == keys


def test_copied_rows_are_seen_in_order(tmp_path: Path) -> None:
    seen: dict[str, list] = {}
    root = single(tmp_path / "m", tensors() | {"big": np.arange(600_000, dtype=np.float32).reshape(-1, 3)})
    write(root, tmp_path / "out", watch=lambda key, rows: seen.setdefault(key, []).append(rows.copy()), threads=2)
    assert set(seen) == {*tensors(), "big"} - {KEY}
    assert len(seen["big"]) > 1
    np.testing.assert_array_equal(np.concatenate(seen["big"]), held(root)["big"])


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
        header.replace(b"lm_head", b"xx_head"),
        header.replace(b"[5,4]", b"[4,5]"),
        header.replace(b"data_offsets", b"data_offset_"),
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


def test_the_old_one_is_put_back_if_the_new_one_cannot_take_its_place(tmp_path: Path, monkeypatch) -> None:
    root = single(tmp_path / "m", tensors())
    write(root, tmp_path / "out")
    before = contents(tmp_path)
    rename = Path.replace

    def failing(self, target):
        if self.name.endswith(".part"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(FormatError, match="Input/output error"):
        write(root, tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == before


def dead() -> int:
    """The number of a process that runs no more."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_what_a_killed_process_left_is_tidied_up(tmp_path: Path) -> None:
    root = single(tmp_path / "m", tensors())
    gone = dead()
    part, old, other = (
        tmp_path / name for name in (f".out.{gone}.part", f".out.{gone}.old", f".out.{os.getppid()}.part")
    )
    for path in (part, old, other):
        path.mkdir()
        (path / "config.json").write_text("x")
    held = lock(other)
    with pytest.raises(OptionError, match="exists"):  # the old one is back in its place, and there to stay
        write(root, tmp_path / "out")
    assert contents(tmp_path / "out") == {"config.json": b"x"}
    assert other.exists()  # its process is alive
    assert held is not None
    os.close(held)
    shutil.rmtree(other)
    write(root, tmp_path / "out", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"m", "out"}


def test_only_what_was_left_for_this_target_is_tidied_up(tmp_path: Path) -> None:
    root, gone = single(tmp_path / "m", tensors()), dead()
    other, own = tmp_path / f".out.v2.{gone}.old", tmp_path / f".o[u]t.{gone}.part"
    for path in (other, own):
        path.mkdir()
    write(root, tmp_path / "out")
    write(root, tmp_path / "o[u]t")
    assert {path.name for path in tmp_path.iterdir()} == {"m", "out", "o[u]t", other.name}


def test_a_full_disk_is_seen_before_the_first_byte(tmp_path: Path, monkeypatch) -> None:
    root = single(tmp_path / "m", tensors())
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(FormatError, match=r"it takes \d+ bytes, but the disk has 1 left") as error:
        write(root, tmp_path / "out")
    assert str(error.value).count(str(tmp_path / "out")) == 1
    assert clean(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_a_target_into_which_another_process_writes_is_refused(suffix: str, overwrite: bool, tmp_path: Path) -> None:
    root = single(tmp_path / "m", tensors())
    target = tmp_path / f"out{suffix}"
    part = tmp_path / f".{target.name}.{os.getppid()}.part"
    part.touch() if suffix else part.mkdir()
    descriptor = lock(part)  # as the other process holds it
    try:
        with pytest.raises(OptionError, match="another run is writing there"):
            write(root / "model.safetensors" if suffix else root, target, overwrite=overwrite)
    finally:
        os.close(descriptor)
    assert sorted(path.name for path in tmp_path.iterdir()) == [part.name, "m"]
    write(root / "model.safetensors" if suffix else root, target)  # the other process has ended
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", target.name]


def test_of_two_processes_that_begin_together_one_goes_on(tmp_path: Path, monkeypatch) -> None:
    root, target = single(tmp_path / "m", tensors()), Path("out")
    monkeypatch.chdir(tmp_path)
    part = tmp_path / f".out.{os.getpid() + 1}.part"
    part.mkdir()
    descriptor = lock(part)
    giving_way = threading.Timer(0.05, lambda: (part.rmdir(), os.close(descriptor)))
    giving_way.start()
    write(root, target)
    giving_way.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]


def test_a_target_that_another_process_has_written_meanwhile_stays(tmp_path: Path) -> None:
    root, target = single(tmp_path / "m", tensors()), tmp_path / "out"

    def fill(key: str):
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"theirs")
        yield NEW.astype(np.float16)

    with pytest.raises(OptionError, match="another run has written there meanwhile"):
        write(root, target, fill=fill)
    assert contents(target) == {"model.safetensors": b"theirs"}
    with pytest.raises(OptionError, match="another run has written there meanwhile"):
        atomic.check_still_free(target, overwrite=False)
    atomic.check_still_free(target, overwrite=True)


def test_short_writes_are_completed(tmp_path: Path, monkeypatch) -> None:
    root = single(tmp_path / "m", tensors())
    pwrite = os.pwrite
    monkeypatch.setattr(
        model_writer.os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: max(1, len(data) // 2)], offset)
    )
    write(root, tmp_path / "out")
    np.testing.assert_array_equal(held(tmp_path / "out")[KEY].astype(np.float32), NEW)


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


def test_the_disk_is_told_to_begin_on_the_way(tmp_path: Path, monkeypatch) -> None:
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system has no such call")
    root, told = single(tmp_path / "m", tensors()), []
    monkeypatch.setattr(disk, "HURRY", 64)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, count, what: told.append((start, count)))
    write(root, tmp_path / "out")
    assert told
    assert all(start % 64 == 0 and count % 64 == 0 for start, count in told)
    np.testing.assert_array_equal(held(tmp_path / "out")[KEY].astype(np.float32), NEW)


@pytest.mark.parametrize("refused", [False, True])
def test_the_memory_of_old_files_is_released_before_new_ones_are_written(
    refused: bool, tmp_path: Path, monkeypatch
) -> None:
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system has no such call")
    root, released = single(tmp_path / "m", tensors()), []
    write(root, tmp_path / "out")
    before = contents(tmp_path / "out")
    old = [(tmp_path / "out" / name).stat().st_ino for name in before]

    def advise(fd: int, start: int, count: int, what: int) -> None:
        if (start, count) == (0, 0):
            # The old files are complete, and nothing is written yet but the empty folder.
            assert contents(tmp_path / "out") == before
            assert not any(any(part.iterdir()) for part in tmp_path.glob(".*.part"))
            released.append(os.fstat(fd).st_ino)
            if refused:
                raise OSError("not on this disk")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    write(root, tmp_path / "out", overwrite=True)
    assert sorted(released) == sorted(old)
    assert contents(tmp_path / "out") == before


def test_links_and_files_with_a_second_name_are_not_released(tmp_path: Path, monkeypatch) -> None:
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system has no such call")
    folder, released = tmp_path / "old" / "inner", []
    folder.mkdir(parents=True)
    (folder / "own").write_bytes(b"own")
    (tmp_path / "base").write_bytes(b"base")
    (folder / "second_name").hardlink_to(tmp_path / "base")
    (folder / "link").symlink_to(tmp_path / "base")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *_: released.append(os.fstat(fd).st_ino))
    for path in (tmp_path / "old", folder / "own", folder / "link", folder / "pipe", tmp_path / "nothing"):
        disk.release_pages(path)
    assert released == [(folder / "own").stat().st_ino] * 2

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "no permission")

    monkeypatch.setattr(Path, "is_dir", refuse)
    disk.release_pages(tmp_path / "old")


@pytest.mark.parametrize("threads", [1, 3])
def test_every_byte_is_told_of_as_it_is_written(threads: int, tmp_path: Path) -> None:
    root, told = sharded(tmp_path / "m", tensors()), []
    write(root, tmp_path / "out", threads=threads, step=told.append)
    files = model_files(root)
    assert sum(told) == model_writer.copy_bytes(files.tensors, {}) == sum(t.nbytes for t in files.tensors.values())
