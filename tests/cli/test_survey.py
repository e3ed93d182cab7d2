"""``loralens survey``: exact output on a small folder, JSON and CSV, nothing that stops it."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loralens
from tests.cli.command import Command
from tests.conftest import small_adapter

run, told = Command("survey").run, Command("survey").told


@pytest.fixture
def folder(small: Path, tmp_path: Path) -> Path:
    shutil.copytree(small, tmp_path / "a")
    shutil.copytree(small, tmp_path / "b" / "copy")
    near = small_adapter().map(lambda m: loralens.LowRank(m.B * np.float32(1.003), m.A, m.scale))
    loralens.save(near, tmp_path / "c")
    (tmp_path / "bad.safetensors").write_bytes(b"{}")
    (tmp_path / "old.bin").write_bytes(b"PK\3\4 and more")
    save_file({"model.embed.weight": np.ones((300, 2), np.float32)}, tmp_path / "model.safetensors")
    nan = small_adapter().map(lambda m: loralens.LowRank(m.B * np.float32(np.nan), m.A, m.scale))
    loralens.save(nan, tmp_path / "nan")
    return tmp_path


def test_table(folder: Path) -> None:
    result = run(folder)
    assert result.exit_code == 0
    lines = result.stdout.replace(str(folder), "FOLDER").splitlines()
    assert lines[0].startswith("FOLDER: 3 adapters, 2 of them the same as another, ")
    rows = {line.split()[0]: " ".join(line.split()) for line in lines if line}
    fingerprint = told(folder)["adapters"][0]["fingerprint"][:12]
    size = f"{(folder / 'a' / 'adapter_model.safetensors').stat().st_size / 1000:.1f} kB"
    assert rows["a"] == f"a peft base 6 (1 zero) 2 4 120 {size} 9.695 1.79 {fingerprint}"
    assert rows["b/copy"].endswith(f"{fingerprint} = a")
    assert rows["c"].endswith("≈ a (ΔW differs by 0.003)")
    assert rows["bad.safetensors"] == "bad.safetensors 2 bytes are too few for any tensor file"
    assert rows["nan"] == "nan model.layers.0.self_attn.q_proj: a factor holds NaN or Inf"
    assert rows["old.bin"].startswith("old.bin its zip archive is damaged")
    assert lines[-1].startswith("no adapters: 1 file of 2.")
    assert lines[-1].endswith("model.safetensors")


@pytest.mark.parametrize("kind", ["adapter", "unreadable", "model"])
def test_a_folder_with_anything_in_it_is_not_called_empty(kind: str, small: Path, tmp_path: Path) -> None:
    if kind == "adapter":
        shutil.copytree(small, tmp_path / "a")
    elif kind == "unreadable":
        (tmp_path / "bad.safetensors").write_bytes(b"{}")
    else:
        save_file({"model.embed.weight": np.ones((300, 2), np.float32)}, tmp_path / "model.safetensors")
    assert "no adapter in this folder" not in run(tmp_path).stdout


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_what_is_no_adapter_is_counted_and_added_up(count: int, tmp_path: Path) -> None:
    names, whole = [f"model-{i}.safetensors" for i in range(count)], 0
    for i, name in enumerate(names):
        save_file({"model.embed.weight": np.ones((300, 2 + i), np.float32)}, tmp_path / name)
        (tmp_path / f"old-{i}.bin").write_bytes(b"PK\3\4 and more")
        whole += (tmp_path / name).stat().st_size
    lines = run(tmp_path).stdout.splitlines()
    files, hold = ("1 file", "holds") if count == 1 else (f"{count} files", "hold")
    listed = ", ".join(names[:3]) + (" …" if count > 3 else "")
    assert lines[-1] == f"no adapters: {files} of {whole / 1000:.1f} kB {hold} tensors and no LoRA pairs: {listed}"
    assert lines[0] == f"{tmp_path}: 0 adapters, {files} that cannot be read."


RECORD = {
    "path", "format", "base_model", "modules", "zero_modules", "ranks", "scales", "parameters", "bytes", "frobenius",
    "effective_rank", "fingerprint", "duplicate_of", "duplicate_kind", "duplicate_difference", "findings",
}  # fmt: skip


def test_it_writes_nothing_into_the_folder(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    run(folder)
    assert sorted(folder.rglob("*")) == before


def test_an_index_that_is_up_to_date_answers(folder: Path) -> None:
    def norm(*options: str) -> float:
        return float(told(*options, folder)["adapters"][0]["frobenius"])

    before = norm()
    loralens.Fleet.open(folder).update(folder)
    # Other numbers in a file of the same size and time, which only a survey that reads the file sees.
    file = folder / "a" / "adapter_model.safetensors"
    status, content = file.stat(), file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:start] + (2 * np.frombuffer(content[start:], "<f4")).tobytes())
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert norm() == before
    # With another option the files are read in another way, and after a change of its time the file is read again.
    assert norm("--once") == pytest.approx(4 * before)
    os.utime(file)
    assert norm() == pytest.approx(4 * before)


def test_an_index_that_cannot_be_read_is_no_obstacle(folder: Path) -> None:
    expected = told(folder)
    loralens.Fleet.open(folder).update(folder)
    (folder / ".loralens-fleet" / "catalogue.sqlite").write_bytes(b"not a catalogue")
    assert told(folder) == expected


def test_json_keeps_its_contract(folder: Path) -> None:
    record = told(folder)
    assert record["loralens"] == loralens.__version__
    assert record["folder"] == str(folder)
    one, two, three = record["adapters"]
    assert all(set(adapter) >= RECORD for adapter in (one, two, three))
    assert one["path"] == str(folder / "a" / "adapter_model.safetensors")
    assert (one["format"], one["base_model"], one["modules"], one["zero_modules"]) == ("peft", "tiny/base", 6, 1)
    assert one["duplicate_of"] is one["duplicate_kind"] is one["duplicate_difference"] is None
    assert (two["duplicate_of"], two["duplicate_kind"], two["duplicate_difference"]) == (one["path"], "tensors", 0)
    assert (three["duplicate_of"], three["duplicate_kind"]) == (one["path"], "update")
    assert {Path(bad["path"]).relative_to(folder).parts[0] for bad in record["unreadable"]} == {
        "bad.safetensors", "old.bin", "nan",
    }  # fmt: skip
    assert [Path(other["path"]).name for other in record["no_adapters"]] == ["model.safetensors"]
