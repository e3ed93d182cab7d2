"""Copies in other dialects, dtypes, gauges and ranks are found, and what is not a copy is not called one."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

import loralens
from loralens.core import Extra, LazyArray
from tests.draws import draw_basis
from tests.fleet.makers import indexed
from tests.fleet.synthetic import adapter_of, make_fleet, random_factors


def copies_of(result: Any) -> dict[str, str]:
    return {copy.member.name: copy.kept.name for copy in result}


def changed(adapter: loralens.Adapter, by: float, seed: int = 5) -> loralens.Adapter:
    """The adapter with noise of this relative size in every B."""
    rng = np.random.default_rng(seed)

    def noisy(module: loralens.LowRank) -> loralens.LowRank:
        noise = rng.standard_normal(module.B.shape)
        noise *= by * np.linalg.norm(module.B) / np.linalg.norm(noise)
        return loralens.LowRank(module.B + noise.astype(np.float32), module.A, module.scale)

    return adapter.map(noisy)  # type: ignore[arg-type]


def adapter() -> loralens.Adapter:
    return adapter_of(random_factors(np.random.default_rng(11), 8), scale=2.0)


def turned(one: loralens.Adapter) -> loralens.Adapter:
    Q = draw_basis(1, 8, 8).astype(np.float32)
    return one.map(lambda m: loralens.LowRank(m.B @ Q, Q.T @ m.A, m.scale))


def wider(one: loralens.Adapter) -> loralens.Adapter:
    Q = draw_basis(2, 16, 8).astype(np.float32)
    return one.map(lambda m: loralens.LowRank(m.B @ Q.T, Q @ m.A, m.scale))


def test_copies_in_other_forms_are_found(tmp_path: Path) -> None:
    one = adapter()
    loralens.save(one, tmp_path / "a-original")
    forms = {
        "alpha": one.map(lambda m: loralens.LowRank(m.B * 2, m.A, m.scale / 2)),
        "gauge": turned(one),
        "rank": wider(one),
        "bf16": one.map(lambda m: loralens.LowRank(m.B.astype(bfloat16), m.A.astype(bfloat16), m.scale)),
        "f16": one.map(lambda m: loralens.LowRank(m.B.astype(np.float16), m.A.astype(np.float16), m.scale)),
    }
    for name, form in forms.items():
        loralens.save(form, tmp_path / name)
    for dialect in ("mlx", "kohya"):
        loralens.save(one, tmp_path / dialect, format=dialect)
    make_fleet(tmp_path / "others")
    result = indexed(tmp_path).copies()
    assert copies_of(result) == dict.fromkeys((*forms, "mlx", "kohya"), "a-original")
    kinds = {copy.member.name: copy.sameness.kind for copy in result}
    assert kinds == {**dict.fromkeys(forms, "update"), "mlx": "tensors", "kohya": "tensors"}
    assert all(copy.sameness.difference < 5e-3 and copy.safe_to_delete for copy in result)
    assert not result.close
    # The file of kohya has no configuration beside it.
    assert len([path for path in result.safe_to_delete if path.suffix == ".safetensors"]) == 7
    assert tmp_path / "a-original" / "adapter_model.safetensors" not in result.safe_to_delete


def test_steps_are_not_copies_however_near(tmp_path: Path) -> None:
    one = adapter()
    loralens.save(one, tmp_path / "run/checkpoint-3500")
    loralens.save(changed(one, 0.001), tmp_path / "run/checkpoint-3750")
    # The final adapter has no step of its own, and the numbers of the last checkpoint.
    loralens.save(changed(one, 0.001), tmp_path / "run/final")
    result = indexed(tmp_path).copies()
    assert len(result) == 1
    assert {result[0].member.name, result[0].kept.name} == {"run/checkpoint-3750", "run/final"}
    assert [copy.sameness.reason for copy in result.close] == ["steps 3500 and 3750"]
    assert result.close[0].sameness.difference < 5e-3


@pytest.mark.parametrize(
    ("by", "kind"),
    # Noise in B of 1 % is more than rounding, and the cosine is 0.99995.
    [(0.002, "copy"), (0.01, "close"), (0.2, "")],
)
def test_more_than_rounding_is_not_a_copy(tmp_path: Path, by: float, kind: str) -> None:
    loralens.save(adapter(), tmp_path / "a")
    loralens.save(changed(adapter(), by), tmp_path / "b")
    result = indexed(tmp_path).copies()
    assert (len(result), len(result.close)) == ((1, 0) if kind == "copy" else (0, 1) if kind == "close" else (0, 0))
    assert all(copy.sameness.reason == "differs by more than rounding" for copy in result.close)


def test_another_head_is_not_a_copy(tmp_path: Path) -> None:
    one = adapter()
    for name, value in (("a", 1.0), ("b", 2.0)):
        head = Extra("saved", "classifier", LazyArray.of(np.full((2, 32), value, np.float32)))
        with_head = replace(turned(one) if name == "b" else one, extra={"base_model.model.classifier.weight": head})
        loralens.save(with_head, tmp_path / name)
    result = indexed(tmp_path).copies()
    assert not result.copies
    assert [copy.sameness.reason for copy in result.close] == ["classifier.weight differs"]


def test_links_are_not_copies_and_their_targets_stay(tmp_path: Path) -> None:
    loralens.save(adapter(), tmp_path / "real")
    shutil.copytree(tmp_path / "real", tmp_path / "copy")
    shutil.copytree(tmp_path / "real", tmp_path / "used")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/adapter_model.safetensors").symlink_to(tmp_path / "used/adapter_model.safetensors")
    shutil.copy(tmp_path / "used/adapter_config.json", tmp_path / "linked")
    (tmp_path / "hard").mkdir()
    os.link(tmp_path / "real/adapter_model.safetensors", tmp_path / "hard/adapter_model.safetensors")
    shutil.copy(tmp_path / "used/adapter_config.json", tmp_path / "hard")
    result = indexed(tmp_path).copies()
    assert result.members == 3
    assert {link.member.name: link.file.name for link in result.links} == {"linked": "used", "real": "hard"}
    assert all(copy.kept.name == "used" for copy in result)
    assert {path.parent.name for path in result.safe_to_delete} == {"copy", "hard"}
    assert "used" not in copies_of(result)


@pytest.mark.parametrize(
    ("first", "other", "reason"),
    [
        ("org/base", "org/base", ""),
        ("org/base", "base", ""),
        ("/models/Base", "org/base", ""),
        ("org/base", "rival/base", "names another base: rival/base"),
        ("distilbert-base-uncased", "distilbert-base-cased", "names another base: distilbert-base-cased"),
        ("org/base", "", ""),
    ],
)
def test_a_copy_that_names_another_base_stays(first: str, other: str, reason: str, tmp_path: Path) -> None:
    loralens.save(replace(adapter(), base_model=first), tmp_path / "a")
    loralens.save(replace(adapter(), base_model=other), tmp_path / "b")
    for name, age in (("a", 3), ("b", 2)):
        for file in (tmp_path / name).iterdir():
            os.utime(file, (1e9 - age, 1e9 - age))
    (copy,) = indexed(tmp_path).copies()
    assert (copy.kept.name, copy.protected, copy.safe_to_delete) == ("a", reason, not reason)
    assert bool(copy.files) == (not reason)


def test_a_configuration_goes_with_the_last_weights_that_need_it(tmp_path: Path) -> None:
    loralens.save(adapter(), tmp_path / "kept")
    shutil.copytree(tmp_path / "kept", tmp_path / "alone-in-its-folder")
    (tmp_path / "alone-in-its-folder" / "training_args.bin").write_bytes(b"x")
    shutil.copytree(tmp_path / "kept", tmp_path / "shared-with-others")
    loralens.save(changed(adapter(), 0.9), tmp_path / "other")
    (tmp_path / "other" / "adapter_model.safetensors").rename(tmp_path / "shared-with-others" / "adapter.safetensors")
    shutil.rmtree(tmp_path / "other")
    for file in (tmp_path / "kept").iterdir():
        os.utime(file, (1e9, 1e9))
    result = indexed(tmp_path).copies()
    assert {(path.parent.name, path.name) for path in result.safe_to_delete} == {
        ("alone-in-its-folder", "adapter_model.safetensors"),
        ("alone-in-its-folder", "adapter_config.json"),
        ("shared-with-others", "adapter_model.safetensors"),
    }
    sizes = {copy.member.name: copy.freed - copy.member.bytes for copy in result}
    assert sizes["alone-in-its-folder"] == (tmp_path / "kept" / "adapter_config.json").stat().st_size
    assert sizes["shared-with-others/adapter_model.safetensors"] == 0


def test_what_can_be_deleted_leaves_one_of_every_update(tmp_path: Path) -> None:
    make_fleet(tmp_path, families=2, runs=1)
    for i in range(3):
        shutil.copytree(tmp_path / "f0-r0/checkpoint-100", tmp_path / f"again-{i}")
    fleet = indexed(tmp_path)
    before = {member.fingerprint for member in fleet.members()}
    for path in fleet.copies().safe_to_delete:
        path.unlink()
    assert not fleet.update(tmp_path).unreadable
    assert {member.fingerprint for member in fleet.members()} == before
    assert len(fleet.members()) == len(before)
    assert fleet.copies().conclusion() == ["6 adapters: none is a copy of another."]


@pytest.mark.parametrize("change", ["gone", "another", "config"])
def test_no_copy_is_safe_to_delete_if_the_kept_file_is_not_what_was_indexed(change: str, tmp_path: Path) -> None:
    first, other = (adapter_of(random_factors(np.random.default_rng(seed))) for seed in (1, 2))
    for name, age in (("a", 3), ("b", 2)):
        loralens.save(first, tmp_path / name)
        for file in (tmp_path / name).iterdir():
            os.utime(file, (1e9 - age, 1e9 - age))
    fleet = indexed(tmp_path)
    assert {path.parent.name for path in fleet.copies().safe_to_delete} == {"b"}
    if change == "gone":
        shutil.rmtree(tmp_path / "a")
    elif change == "another":
        file = tmp_path / "a" / "adapter_model.safetensors"
        written = file.stat()
        loralens.save(other, tmp_path / "a", overwrite=True)
        # Even if its time and size are those that were indexed.
        if file.stat().st_size == written.st_size:
            os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))
        config = tmp_path / "a" / "adapter_config.json"
        os.utime(config, (1e9 - 3, 1e9 - 3))
    else:
        config = tmp_path / "b" / "adapter_config.json"
        config.write_text(config.read_text().replace("lora_alpha", "lora_Alpha"))
    assert fleet.copies().safe_to_delete == []
