"""Every command on every real PEFT adapter, and every negative file refused. Skips where the folder is absent."""

from pathlib import Path

import numpy as np
import pytest

import loralens
from tests.cli.command import Command
from tests.conftest import real_adapters

# folder → modules, ranks, scale, extras, kinds of layout
PEFT = {
    "bertbase-rslora-epoch2": (24, {8}, 8 / 8**0.5, 2, {"linear"}),
    "bloom560m-mergedlinear": (24, {16}, 2.0, 0, {"merged"}),
    "gemma270m-aowei-main": (72, {4}, 4.0, 0, {"linear"}),
    "gemma270m-zouhe0": (72, {4}, 4.0, 0, {"linear"}),
    "gpt2-emotion-anirudh": (12, {8}, 1.0, 1, {"linear"}),
    "labram-eeg-partialzero": (49, {8}, 4.0, 0, {"linear"}),
    "minilm-souravt-ckpt100": (12, {8}, 2.0, 0, {"linear"}),
    "minilm-souravt-ckpt400": (12, {8}, 2.0, 0, {"linear"}),
    "minilm-souravt-ckpt750": (12, {8}, 2.0, 0, {"linear"}),
    "minilm-souravt-finetuned": (12, {8}, 2.0, 0, {"linear"}),
    "opt125m-bf16-r16": (24, {16}, 2.0, 0, {"linear"}),
    "qwen05b-peft-r8": (48, {8}, 2.0, 0, {"linear"}),
    "roberta-agnews-biasall": (36, {4}, 4.0, 105, {"linear"}),
}
# folder → format, modules, ranks, shape of the first module
OTHERS = {
    "flux-aitoolkit-r16": ("diffusers", 4, {16}, (3072, 15360)),
    "qwen05b-mlx-100": ("mlx", 8, {8}, (896, 896)),
    "roberta-mnli-loralib": ("loralib", 24, {8}, (768, 768)),
    "sam-vitb-rank2": ("plain", 24, {2}, (768, 768)),
    "sam-vitb-rank4": ("plain", 24, {4}, (768, 768)),
    "sam-vitb-rank8": ("plain", 24, {8}, (768, 768)),
    "sam-vitb-rank16": ("plain", 24, {16}, (768, 768)),
    "sd15-cloneofsimo-disney-r1": ("safeloras", 192, {1}, (768, 768)),
    "sd15-diffusers-processor": ("diffusers", 128, {4}, (320, 320)),
    "sd15-timohavdk-diffusers": ("diffusers", 128, {4}, (320, 320)),
    "sd15-timohavdk-kohya": ("kohya", 128, {4}, (320, 320)),
}
NEGATIVE = {
    "neg-2byte": "2 bytes are too few",
    "neg-lfs-pointer": "is a Git-LFS pointer, not the weights",
    "neg-prompt-tuning": "PROMPT_TUNING",
}

pytestmark = pytest.mark.skipif(real_adapters() is None, reason="no real adapters: set LORALENS_REAL_ADAPTERS")


run, told = Command().run, Command().told


@pytest.mark.parametrize("name", PEFT)
def test_modules_ranks_scales_and_leftovers(name: str, real: Path) -> None:
    count, ranks, scale, extras, layouts = PEFT[name]
    adapter = loralens.load(real / name)
    modules = adapter.modules.values()
    assert len(adapter) == count
    assert {module.rank for module in modules} == ranks
    assert {module.scale for module in modules} == {scale}
    assert {module.layout.kind for module in modules} == layouts
    assert len(adapter.extra) == extras


@pytest.mark.some(4)
@pytest.mark.parametrize("name", PEFT)
def test_singular_values_are_those_of_the_dense_update(name: str, real: Path) -> None:
    adapter = loralens.load(real / name)
    record = told("spectrum", real / name)["adapters"][0]
    assert [module["name"] for module in record["modules"]] == list(adapter)
    for module in record["modules"][:1]:
        dense = np.linalg.svd(adapter[module["name"]].dense(), compute_uv=False)
        s = module["singular_values"]
        np.testing.assert_allclose(s, dense[: len(s)], rtol=1e-9, atol=1e-14 * dense[0])


@pytest.mark.some(4)
@pytest.mark.parametrize("name", OTHERS)
def test_other_dialects_are_told_by_their_content(name: str, real: Path) -> None:
    form, count, ranks, shape = OTHERS[name]
    adapter = loralens.load(real / name)
    modules = list(adapter.modules.values())
    assert (adapter.format, len(adapter), {module.rank for module in modules}) == (form, count, ranks)
    assert modules[0].shape == shape
    for command in ("inspect", "spectrum"):
        assert run(command, real / name).exit_code == 0


def test_one_adapter_in_two_dialects_is_equal(real: Path) -> None:
    result = run("equal", real / "sd15-timohavdk-diffusers", real / "sd15-timohavdk-kohya", "--tolerance", "0")
    assert "different" not in result.stdout or float(result.stdout.split("difference ")[1].split(",")[0]) < 1e-14


def test_loralib_through_peft_and_back(real: Path, tmp_path: Path) -> None:
    source = real / "roberta-mnli-loralib"
    pickled = ("--alpha", "16")
    there, back = tmp_path / "peft", tmp_path / "back"
    assert run("convert", source, "-o", there, "--to", "peft", *pickled).exit_code == 2  # its head has no place there
    assert run("convert", source, "-o", there, "--to", "peft", "--drop-extra", *pickled).exit_code == 0
    assert run("convert", there, "-o", back, "--to", "loralib").exit_code == 0
    assert run("equal", source, back, *pickled).exit_code == 0
    assert {module.scale for module in loralens.load(back).modules.values()} == {2.0}


@pytest.mark.some(6)
@pytest.mark.parametrize("to", ["peft", "kohya", "diffusers", "comfyui", "mlx", "loralib"])
@pytest.mark.parametrize(
    "name", ["bertbase-rslora-epoch2", "bloom560m-mergedlinear", "opt125m-bf16-r16", "sam-vitb-rank4"]
)
def test_converted_it_is_the_same_update(name: str, to: str, real: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    arguments = ("convert", real / name, "-o", target, "--to", to, "--drop-extra")
    assert run(*arguments).exit_code == 0
    assert run("equal", real / name, target, "--tolerance", "1e-13").exit_code == 0


@pytest.mark.parametrize("name", NEGATIVE)
def test_what_is_no_adapter_is_refused(name: str, real: Path) -> None:
    for command in ("inspect", "spectrum"):
        result = run(command, real / name)
        assert result.exit_code == 2
        assert NEGATIVE[name] in result.stderr
        assert "\n  fix: " in result.stderr
        assert result.stdout == ""


def test_a_dead_module_is_said(real: Path) -> None:
    result = run("inspect", real / "labram-eeg-partialzero")
    assert "12 of 49 modules do nothing" in result.stdout
