"""Making and updating an index: every dialect, what is new, changed and gone, links, and files that cannot be read."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens import fingerprint
from loralens.fleet import measuring
from loralens.fleet.measuring import measure_adapter
from tests.bases import edit_config
from tests.fleet.makers import indexed, random_adapter, save, save_many


@pytest.fixture
def fleet(tmp_path: Path) -> loralens.Fleet:
    save_many(tmp_path, 4)
    return indexed(tmp_path)


def names(fleet: loralens.Fleet) -> list[str]:
    return [member.name for member in fleet.members()]


def counts_of(result: object) -> dict[str, int]:
    return {kind: number for kind, number in result.counts().items() if number}  # type: ignore[attr-defined]


def test_the_index_has_what_the_files_have(fleet: loralens.Fleet, tmp_path: Path) -> None:
    members, sketches = fleet.snapshot()
    assert names(fleet) == ["a000", "a001", "a002", "a003"]
    assert fleet.root == tmp_path
    assert fleet.home == tmp_path / ".loralens-fleet"
    for i, member in enumerate(members):
        adapter = loralens.load(tmp_path / member.name)
        measures = measure_adapter(adapter)
        assert member.path == tmp_path / member.name / "adapter_model.safetensors"
        assert member.fingerprint == fingerprint(adapter)
        assert (member.modules, member.ranks, member.scales, member.base) == (4, (4,), (2.0,), "tiny/base")
        assert member.parameters == adapter.parameters
        assert member.bytes == member.path.stat().st_size
        np.testing.assert_array_equal(sketches.codes[i], measures.sketch.codes)
        np.testing.assert_array_equal(sketches.starts[i], measures.sketch.start)
        assert sketches.steps[i] == measures.sketch.step
        assert fleet.norms(member) == pytest.approx(measures.norms, rel=1e-4)
        assert list(fleet.norms(member)) == list(fleet.signature(member).keys) == list(fleet.modules(adapter))
        assert fleet.signature(member).shapes == ((24, 32),) * 4
        assert fleet.signature(member).names[0] == "model_layers_0_self_attn_q_proj"
        assert fleet.adapter(member).modules.keys() == adapter.modules.keys()
        np.testing.assert_array_equal(fleet.sketch(adapter).codes, sketches.codes[i])


def test_nothing_is_read_again_where_nothing_has_changed(
    fleet: loralens.Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "examine_file", None)
    result = fleet.update()
    assert not result.changes
    assert result.conclusion() == [f"{tmp_path}: 4 adapters in the index {fleet.home}. Nothing has changed."]
    assert not fleet.changes()


def test_new_changed_and_gone_files(fleet: loralens.Fleet, tmp_path: Path) -> None:
    before = {member.name: member for member in fleet.members()}
    shutil.rmtree(tmp_path / "a001")
    save(tmp_path / "a002", random_adapter(77), overwrite=True)
    save(tmp_path / "sub" / "b", random_adapter(8))
    assert fleet.changes() == {"new": 1, "changed": 1, "gone": 1}
    result = fleet.update()
    assert counts_of(result) == {"new": 1, "changed": 1, "gone": 1}
    assert names(fleet) == ["a000", "a002", "a003", "sub/b"]
    after = {member.name: member for member in fleet.members()}
    assert after["a000"] == before["a000"]
    assert after["a002"].number == before["a002"].number
    assert after["a002"].added == before["a002"].added
    assert after["a002"].fingerprint == fingerprint(random_adapter(77))
    np.testing.assert_array_equal(
        fleet.sketches().codes[1], measure_adapter(loralens.load(tmp_path / "a002")).sketch.codes
    )
    assert fleet.rows("select count(*) from signatures").rows == [(1,)]


def test_a_changed_configuration_changes_the_adapter(fleet: loralens.Fleet, tmp_path: Path) -> None:
    """The scale stands in the configuration, so that the file with the weights stays as it was."""
    before = fleet.members()[0].frobenius
    edit_config(tmp_path / "a000", lora_alpha=40)
    assert counts_of(fleet.update()) == {"changed": 1}
    assert fleet.members()[0].frobenius == pytest.approx(5 * before)


def test_every_dialect_has_the_same_sketch(tmp_path: Path) -> None:
    layers = tuple(f"unet.down_blocks.{i}.attentions.0.transformer_blocks.0.attn1.to_q" for i in (0, 1))
    adapter = random_adapter(3, layers=layers)
    save(tmp_path / "peft", adapter)
    for dialect in ("kohya", "diffusers", "comfyui"):
        save(tmp_path / f"{dialect}.safetensors", adapter, format=dialect)
    save(tmp_path / "mlx", random_adapter(1), format="mlx")
    save(tmp_path / "two" / "adapter_model.safetensors", random_adapter(1))
    fleet = loralens.Fleet.open(tmp_path)
    result = fleet.update(tmp_path)
    assert not result.unreadable
    assert {member.name: member.format for member in fleet.members()} == {
        "peft": "peft",
        "kohya.safetensors": "kohya",
        "diffusers.safetensors": "diffusers",
        "comfyui.safetensors": "comfyui",
        "mlx": "mlx",
        "two": "peft",
    }
    directions = dict(zip(names(fleet), fleet.sketches().directions(), strict=True))
    for dialect in ("kohya", "diffusers", "comfyui"):
        assert directions["peft"] @ directions[f"{dialect}.safetensors"] > 0.999
    assert directions["mlx"] @ directions["two"] > 0.999
    starts = dict(zip(names(fleet), fleet.sketches().start_directions(), strict=True))
    assert starts["mlx"] @ starts["two"] > 0.999
    assert abs(directions["mlx"] @ directions["peft"]) < 0.2


def test_links_lead_to_one_file(tmp_path: Path) -> None:
    """A Hub cache has links to blobs; a run has links such as ``latest``; hard links are one file, too."""
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshots = [tmp_path / "models--org--name" / "snapshots" / revision for revision in ("aaa", "bbb")]
    save(tmp_path / "plain", random_adapter(1))
    blobs.mkdir(parents=True)
    shutil.move(tmp_path / "plain" / "adapter_model.safetensors", blobs / "0123")
    shutil.move(tmp_path / "plain" / "adapter_config.json", blobs / "4567")
    shutil.rmtree(tmp_path / "plain")
    for snapshot in snapshots:
        snapshot.mkdir(parents=True)
        (snapshot / "adapter_model.safetensors").symlink_to("../../blobs/0123")
        (snapshot / "adapter_config.json").symlink_to("../../blobs/4567")
    (tmp_path / "latest").symlink_to(snapshots[0])
    copied = tmp_path / "copied"
    shutil.copytree(snapshots[0], copied)
    (tmp_path / "broken.safetensors").symlink_to("nowhere")
    fleet = loralens.Fleet.open(tmp_path)
    assert not fleet.update(tmp_path).unreadable
    by_name = {member.name.rpartition("/")[2]: member for member in fleet.members()}
    assert by_name.keys() == {"aaa", "bbb", "copied"}
    assert by_name["aaa"].real == by_name["bbb"].real != by_name["copied"].real
    assert by_name["aaa"].fingerprint == by_name["copied"].fingerprint
    (copied / "adapter_model.safetensors").unlink()
    os.link(blobs / "0123", copied / "adapter_model.safetensors")
    fleet.update()
    assert len({member.real for member in fleet.members()}) == 1


def test_what_cannot_be_read_has_a_reason(tmp_path: Path) -> None:
    save(tmp_path / "good", random_adapter(1))
    nan = random_adapter(2).map(lambda m: loralens.LowRank(m.B * np.float32(np.nan), m.A, m.scale))
    save(tmp_path / "nan", nan)
    (tmp_path / "bad.safetensors").write_bytes(b"{}")
    (tmp_path / "old.bin").write_bytes(b"PK\3\4 and more")
    (tmp_path / "pointer").mkdir()
    (tmp_path / "pointer" / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "adapter_config.json").write_text("{}")
    whole = (tmp_path / "good" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(whole[: len(whole) // 2])
    fleet = loralens.Fleet.open(tmp_path)
    result = fleet.update(tmp_path)
    reasons = {row.name: row.reason for row in result.unreadable}
    assert names(fleet) == ["good"]
    assert reasons.keys() == {"nan", "bad.safetensors", "old.bin", "pointer", "weightless", "torn.safetensors"}
    assert "NaN or Inf" in reasons["nan"]
    assert "Git-LFS" in reasons["pointer"]
    assert "zip archive" in reasons["old.bin"]
    assert all(row.fix for row in result.unreadable)
    assert result.unreadable == fleet.unreadable()
    assert result.conclusion()[0].endswith("6 files cannot be read.")
    # They are not read again either, until they change.
    assert not fleet.update().changes
    save(tmp_path / "nan", random_adapter(2), overwrite=True)
    assert counts_of(fleet.update()) == {"changed": 1}
    assert names(fleet) == ["good", "nan"]


def test_the_index_may_lie_anywhere_and_move_with_its_folder(tmp_path: Path) -> None:
    save_many(tmp_path / "collection", 2)
    inside, outside = loralens.Fleet.open(tmp_path / "collection"), loralens.Fleet.open(tmp_path / "index")
    inside.update(tmp_path / "collection")
    outside.update(tmp_path / "collection")
    assert outside.home == tmp_path / "index"
    assert names(inside) == names(outside)
    shutil.move(tmp_path / "collection", tmp_path / "moved")
    moved = loralens.Fleet.open(tmp_path / "moved")
    assert moved.root == tmp_path / "moved"
    assert not moved.changes()
    assert outside.changes() == {"gone": 2}
    # The same files under another name of the folder: nothing is measured again.
    assert not outside.update(tmp_path / "moved").changes
    assert outside.members()[0].path.exists()


def test_one_index_has_one_folder(tmp_path: Path) -> None:
    save_many(tmp_path / "one", 1)
    save_many(tmp_path / "two", 1)
    fleet = indexed(tmp_path / "one", tmp_path / "index")
    with pytest.raises(loralens.OptionError, match="is the index of"):
        fleet.update(tmp_path / "two")
    assert names(fleet) == ["a000"]


def test_a_database_of_another_program_is_not_replaced(tmp_path: Path) -> None:
    content = b"a database of another program"
    save_many(tmp_path / "adapters", 1)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "catalogue.sqlite").write_bytes(content)
    with pytest.raises(loralens.OptionError, match="is not an index of loralens"):
        loralens.Fleet.open(tmp_path / "home").update(tmp_path / "adapters")
    assert (tmp_path / "home" / "catalogue.sqlite").read_bytes() == content


def test_names_that_are_not_text(tmp_path: Path) -> None:
    odd = os.fsdecode(b"odd-\xff")
    save(tmp_path / odd, random_adapter(1))
    save(tmp_path / "esc\x1b[31m'; drop table files", random_adapter(2))
    fleet = indexed(tmp_path)
    assert set(names(fleet)) == {odd, "esc\x1b[31m'; drop table files"}
    assert not fleet.update().changes
    assert odd in {row[0] for row in fleet.rows("select name from adapters")}
    assert all(len(fleet.adapter(member)) == 4 for member in fleet.members())


def test_the_whole_disk_is_no_collection(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(Path(tmp_path.anchor))
    for folder in (tmp_path.anchor, tmp_path / "link", "x" * 300):
        with pytest.raises(loralens.OptionError, match=r"is the whole disk|is not a folder"):
            loralens.Fleet.open(tmp_path / "home").update(folder)
    assert not (tmp_path / "home").exists()
