"""Every command on every real PEFT adapter, and every negative file refused. Skips where the folder is absent."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import loralens
from loralens.cli.main import main
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
NEGATIVE = {
    "neg-2byte": "2 bytes are too few",
    "neg-lfs-pointer": "is a Git-LFS pointer, not the weights",
    "neg-prompt-tuning": "PROMPT_TUNING",
}

pytestmark = pytest.mark.skipif(real_adapters() is None, reason="no real adapters: set LORALENS_REAL_ADAPTERS")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.mark.parametrize("name", PEFT)
def test_modules_ranks_scales_and_leftovers(name: str, real: Path) -> None:
    count, ranks, scale, extras, layouts = PEFT[name]
    adapter = loralens.load(real / name, allow_pickle=True)
    modules = adapter.modules.values()
    assert len(adapter) == count
    assert {module.rank for module in modules} == ranks
    assert {module.scale for module in modules} == {scale}
    assert {module.layout.kind for module in modules} == layouts
    assert len(adapter.extra) == extras


@pytest.mark.parametrize("name", PEFT)
def test_singular_values_are_those_of_the_dense_update(name: str, real: Path) -> None:
    adapter = loralens.load(real / name, allow_pickle=True)
    record = json.loads(run("spectrum", "--json", "--allow-pickle", real / name).stdout)["adapters"][0]
    assert [module["name"] for module in record["modules"]] == list(adapter)
    for module in record["modules"][:1]:
        dense = np.linalg.svd(adapter[module["name"]].dense(), compute_uv=False)
        s = module["singular_values"]
        np.testing.assert_allclose(s, dense[: len(s)], rtol=1e-9, atol=1e-14 * dense[0])


@pytest.mark.parametrize("name", PEFT)
def test_tables_are_printed_for_people(name: str, real: Path) -> None:
    for command in ("inspect", "spectrum"):
        result = run(command, "--allow-pickle", real / name)
        assert result.exit_code == 0
        assert len(result.stdout.splitlines()) > 5


@pytest.mark.parametrize("name", NEGATIVE)
def test_what_is_no_adapter_is_refused(name: str, real: Path) -> None:
    for command in ("inspect", "spectrum"):
        result = run(command, real / name)
        assert result.exit_code == 1
        assert NEGATIVE[name] in result.stderr
        assert "\n  fix: " in result.stderr
        assert result.stdout == ""


def test_a_dead_module_is_said(real: Path) -> None:
    result = run("inspect", real / "labram-eeg-partialzero")
    assert "12 of 49 modules do nothing" in result.stdout


def test_a_pickle_needs_permission(real: Path) -> None:
    result = run("spectrum", real / "bertbase-rslora-epoch2")
    assert result.exit_code == 1
    assert "--allow-pickle" in result.stderr
