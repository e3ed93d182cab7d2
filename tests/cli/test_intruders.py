"""``loralens intruders``: exact output on a small base, the JSON contract, the cache, the edit, both error exits."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loralens
from loralens.core import Extra, LazyArray
from tests.bases import stored
from tests.cli.command import Command
from tests.conftest import small_adapter
from tests.models import low_rank
from tests.reference import intruder_scores, intruders_scaled
from tests.tolerances import MITIGATED, SCORE, UPDATED_VALUE

QUERY = "model.layers.0.self_attn.q_proj"
MODULE_KEYS = {
    "name", "shape", "rank", "count", "energy_share", "chance", "random_score", "singular_values", "scores",
    "intruders", "tied", "method",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path: Path) -> None:
    """No test leaves anything in the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


CALL = Command("intruders")
run, told, good, refused = CALL.run, CALL.told, CALL.good, CALL.refused


def base_of(adapter: loralens.Adapter, file: Path, *, size: float = 1.0) -> Path:
    """A base with a random weight for every module."""
    rng = np.random.default_rng(7)
    weights = {f"{name}.weight": size * rng.standard_normal(module.shape) for name, module in adapter.items()}
    save_file({key: W.astype(np.float32) for key, W in weights.items()}, file)
    return file


@pytest.fixture
def diagonal(tmp_path: Path) -> Path:
    """A base whose weights are diagonal, as the updates of the small adapter are: every number is known."""
    W = np.zeros((6, 4), np.float32)
    W[[0, 1, 2, 3], [0, 1, 2, 3]] = 8, 4, 2, 1
    turned = np.zeros((6, 4), np.float32)
    turned[:4] = 0.5 * np.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) * [0.4, 0.3, 0.2, 0.1]
    tensors = {f"{name}.weight": turned if name.endswith("v_proj") else W for name in small_adapter()}
    save_file(tensors, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.fixture
def spread(tmp_path: Path) -> tuple[Path, Path, loralens.Adapter]:
    """An adapter whose updates are as large as its random base, tall, wide and square, and that base."""
    shapes = {"q": (40, 40, 3, 1.0), "k": (30, 40, 3, 0.7), "v": (40, 25, 3, -1.5), "o": (40, 40, 3, 1e-4)}
    modules = {
        f"model.layers.0.self_attn.{kind}_proj": low_rank(*shape, seed=i)
        for i, (kind, shape) in enumerate(shapes.items())
    }
    adapter = loralens.Adapter(modules=modules)
    loralens.save(adapter, tmp_path / "spread")
    return tmp_path / "spread", base_of(adapter, tmp_path / "base.safetensors"), adapter


@pytest.mark.parametrize("top", [1, 10, 100])
def test_json_keeps_its_contract_and_agrees_with_the_definition(spread, top: int) -> None:
    path, base, adapter = spread
    record = told(path, "--base", base, "--top", top)
    assert (record["adapter"], record["base"]) == (str(path), str(base))
    assert (record["threshold"], record["top"]) == (0.5, top)
    assert [module["name"] for module in record["modules"]] == list(adapter)
    W = stored(base)
    for module in record["modules"]:
        assert set(module) == MODULE_KEYS
        s, scores = intruder_scores(W[module["name"] + ".weight"], adapter[module["name"]].dense(), top)
        np.testing.assert_allclose(module["singular_values"], s, atol=UPDATED_VALUE * s[0])
        np.testing.assert_allclose(module["scores"], scores, atol=SCORE)
        expected = [j + 1 for j, score in enumerate(scores) if score < 0.5]
        assert [one["index"] for one in module["intruders"]] == expected
        assert module["count"] == len(expected)
        assert module["energy_share"] == pytest.approx(sum(s[j - 1] ** 2 for j in expected) / sum(s**2), abs=1e-6)
        assert 0 < module["chance"] < 1
    counts = [module["count"] for module in record["modules"]]
    assert record["total"]["count"] == sum(counts) > 0
    if top == 10:
        assert counts[list(adapter).index("model.layers.0.self_attn.o_proj")] == 0


def test_a_second_run_computes_nothing_and_prints_the_same(spread, tmp_path: Path, monkeypatch) -> None:
    path, base, _ = spread
    first = run(path, "--base", base, "--json")
    assert "the SVD of 4 weights" in first.stderr
    assert f"kept in {tmp_path / 'user-cache' / 'loralens'}" in first.stderr
    monkeypatch.setattr("loralens.verbs.spectra.decompositions.decompose", None)
    second = run(path, "--base", base, "--json")
    assert (second.stdout, second.stderr) == (first.stdout, "")
    assert told(path, "--base", base, "-m", "q_proj")["total"]["modules"] == 1


def test_a_changed_weight_is_computed_again_and_a_damaged_entry_said(spread, tmp_path: Path) -> None:
    path, base, adapter = spread
    before = run(path, "--base", base, "--json").stdout
    base_of(adapter, base, size=2.0)
    again = run(path, "--base", base, "--json")
    assert "the SVD of 4 weights" in again.stderr
    assert again.stdout != before
    for file in (tmp_path / "user-cache" / "loralens").iterdir():
        file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    damaged = run(path, "--base", base, "--json")
    assert damaged.stdout == again.stdout
    assert damaged.stderr.count("is damaged: computed again") == 4
    assert run(path, "--base", base, "--json").stderr == ""


def test_the_written_adapter_is_the_edit(spread, tmp_path: Path) -> None:
    path, base, adapter = spread
    record = told(path, "--base", base, "--remove", 0.3, "-o", tmp_path / "new")
    new, W = loralens.load(tmp_path / "new"), stored(base)
    for module in record["modules"]:
        name, indices = module["name"], [one["index"] - 1 for one in module["intruders"]]
        X = W[f"{name}.weight"]
        expected = intruders_scaled(X, adapter[name].dense(), indices, 0.3)
        error = np.abs(X + new[name].dense() - expected).max()
        assert error < MITIGATED * module["singular_values"][0]


# ---------------------------------------------------------------- errors


def test_dora_and_quantised_and_nan_bases_are_refused_by_name(small, tmp_path: Path) -> None:
    adapter = small_adapter()
    magnitude = Extra("magnitude", QUERY, LazyArray.of(np.ones(6, np.float32)))
    key = f"base_model.model.{QUERY}.lora_magnitude_vector"
    dora = loralens.Adapter(modules=adapter.modules, extra={key: magnitude}, config={"peft_type": "LORA", "r": 2})
    loralens.save(dora, tmp_path / "dora")
    base = base_of(adapter, tmp_path / "base.safetensors")
    assert f"{QUERY} is DoRA" in refused(tmp_path / "dora", "--base", base)
    good(tmp_path / "dora", "--base", base, "-m", "v_proj")

    def base_with(array):
        save_file({f"{name}.weight": array for name in adapter}, tmp_path / "odd.safetensors")
        return run(small, "--base", tmp_path / "odd.safetensors")

    codes = base_with(np.zeros((6, 4), np.uint8))
    assert codes.exit_code == 2
    assert "quantised" in codes.stderr
    nan = base_with(np.full((6, 4), np.nan, np.float32))
    assert nan.exit_code == 2
    assert f"{QUERY}: the weight holds NaN or Inf" in nan.stderr
