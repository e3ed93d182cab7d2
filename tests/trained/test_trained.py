"""The project's own trained adapters: every ΔW is what the software that trained it said, through every command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from tests.cli.command import Command

HERE = Path(__file__).parent
EXPECTED: dict[str, dict[str, Any]] = json.loads((HERE / "expected.json").read_text())
ALPHA = {"roberta-loralib": ("--alpha", "8")}  # loralib's files do not say it
# folder → dialect, ranks, scales, what rides along, kinds of layout
SAID: dict[str, tuple[str, set[int], set[float], int, set[str]]] = {
    "gpt2-conv1d": ("peft", {2, 3}, {4.0, 6.0, 2.5}, 0, {"linear"}),
    "bert-rslora-run/checkpoint-20": ("peft", {4}, {3.0}, 6, {"linear"}),
    "bert-rslora-run/checkpoint-40": ("peft", {4}, {3.0}, 6, {"linear"}),
    "bert-rslora-run/checkpoint-60": ("peft", {4}, {3.0}, 6, {"linear"}),
    "bloom-merged": ("peft", {4}, {4.0}, 0, {"merged"}),
    "llama-dora": ("peft", {4}, {2.0}, 6, {"linear", "embedding"}),
    "llama-mlx": ("mlx", {4}, {2.0}, 0, {"linear"}),
    "opt-bf16-partly-zero": ("peft", {4}, {2.0}, 0, {"linear"}),
    "unet-kohya": ("kohya", {2}, {1.5}, 0, {"linear", "conv"}),
    "unet-diffusers": ("diffusers", {2}, {1.5}, 0, {"linear", "conv"}),
    "mixtral-experts": ("peft", {2}, {2.0}, 0, {"experts"}),
    "roberta-loralib": ("loralib", {4}, {2.0}, 2, {"linear"}),
}


run, told = Command().run, Command().told


def reading(folder: str) -> tuple[str, ...]:
    return ALPHA.get(folder, ())


def loaded(folder: str) -> loralens.Adapter:
    alpha = ALPHA.get(folder)
    return loralens.load(HERE / folder, alpha=float(alpha[1]) if alpha else None)


def test_every_folder_is_tested() -> None:
    assert set(SAID) == set(EXPECTED)


@pytest.mark.parametrize("folder", SAID)
def test_what_the_file_says(folder: str) -> None:
    dialect, ranks, scales, extras, kinds = SAID[folder]
    adapter = loaded(folder)
    modules = list(adapter.modules.values())
    assert set(adapter) == set(EXPECTED[folder])
    assert adapter.format == dialect
    assert {module.rank for module in modules} == ranks
    assert {module.scale for module in modules} == scales
    assert {module.layout.kind for module in modules} == kinds
    assert len(adapter.extra) == extras


@pytest.mark.parametrize("folder", SAID)
def test_every_update_is_what_its_trainer_says(folder: str) -> None:
    adapter = loaded(folder)
    record = told("spectrum", *reading(folder), HERE / folder)["adapters"][0]
    measured = {module["name"]: module for module in record["modules"]}
    for name, said in EXPECTED[folder].items():
        dense = adapter[name].dense()
        assert list(dense.shape) == said["shape"], name
        assert np.linalg.norm(dense) == pytest.approx(said["norm"], rel=1e-5, abs=1e-9)
        for place, value in said["entries"].items():
            assert dense.ravel()[int(place)] == pytest.approx(value, rel=1e-4, abs=1e-6 * max(said["norm"], 1e-9))
        s = np.array(measured[name]["singular_values"])
        if said["norm"]:
            np.testing.assert_allclose(s[s > 1e-5 * s[0]], said["singular_values"], rtol=1e-4)
        else:
            assert not s.any()


@pytest.mark.some(6)
@pytest.mark.parametrize("to", ["peft", "kohya", "diffusers", "comfyui", "mlx", "loralib"])
@pytest.mark.parametrize(
    "folder", ["gpt2-conv1d", "bloom-merged", "opt-bf16-partly-zero", "bert-rslora-run/checkpoint-60"]
)
def test_converted_it_is_the_same_update(folder: str, to: str, tmp_path: Path) -> None:
    if (folder, to) == ("gpt2-conv1d", "mlx"):
        pytest.skip("mlx-lm has one rank for all modules")
    target = tmp_path / "target"
    done = run("convert", HERE / folder, "-o", target, "--to", to, "--drop-extra", *reading(folder))
    assert done.exit_code == 0, done.stderr
    assert run("equal", HERE / folder, target, "--tolerance", "1e-13", *reading(folder)).exit_code == 0


def test_one_training_in_two_dialects_is_nearly_equal() -> None:
    """kohya's file is in float16, so the two differ by its rounding and no more."""
    kohya, diffusers = HERE / "unet-kohya", HERE / "unet-diffusers"
    assert run("equal", kohya, diffusers, "--tolerance", "1e-3").exit_code == 0
    assert run("equal", kohya, diffusers, "--tolerance", "1e-6").exit_code == 1


@pytest.mark.parametrize("folder", SAID)
def test_written_back_it_has_the_same_tensors(folder: str, tmp_path: Path) -> None:
    if SAID[folder][0] == "loralib":
        pytest.skip("a pickle; compared as tensors in the tests of its dialect")
    adapter = loaded(folder)
    loralens.save(adapter, tmp_path / "again")
    again = loralens.load(tmp_path / "again")
    assert set(again) == set(adapter)
    for name, module in adapter.items():
        assert (again[name].scale, again[name].dtype) == (module.scale, module.dtype)
        np.testing.assert_array_equal(again[name].B, module.B)
        np.testing.assert_array_equal(again[name].A, module.A)
    assert {extra.role for extra in again.extra.values()} == {extra.role for extra in adapter.extra.values()}


def test_a_block_that_was_never_trained_is_said() -> None:
    assert "2 of 6 modules do nothing" in run("inspect", HERE / "opt-bf16-partly-zero").stdout


def test_a_run_is_put_in_order_by_its_steps() -> None:
    folders = [HERE / "bert-rslora-run" / f"checkpoint-{step}" for step in (60, 20, 40)]
    record = told("trajectory", *folders)
    assert [point["step"] for point in record["checkpoints"]] == [20, 40, 60]
    norms = [
        np.sqrt(sum(said["norm"] ** 2 for said in EXPECTED[f"bert-rslora-run/checkpoint-{step}"].values()))
        for step in (20, 40, 60)
    ]
    assert [point["frobenius"] for point in record["checkpoints"]] == pytest.approx(norms, rel=1e-5)
