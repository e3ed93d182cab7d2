"""``loralens combine``: exact output on a small adapter, the JSON contract, recipes, every refusal."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank
from tests.cli.command import Command
from tests.conftest import small_adapter

Q = "model.layers.0.self_attn.q_proj"

run, told = Command().run, Command("combine").told


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another adapter of the same modules, rank 3, scale −1."""
    rng = np.random.default_rng(0)
    modules = {
        name: LowRank(
            rng.standard_normal((6, 3)).astype(np.float32), rng.standard_normal((3, 4)).astype(np.float32), -1
        )
        for name in small_adapter()
    }
    loralens.save(Adapter(modules=modules), tmp_path / "other")
    return tmp_path / "other"


def test_huge_updates_give_one_message_and_no_warning_of_numpy(small: Path, tmp_path: Path) -> None:
    modules = {
        name: LowRank(np.full((6, 2), 1e30, np.float32), np.full((2, 4), 1e30, np.float32)) for name in small_adapter()
    }
    loralens.save(Adapter(modules=modules), tmp_path / "huge")
    for method in ("ties", "della", "dare", "sum"):
        words = ["combine", str(small), str(tmp_path / "huge"), "--method", method, "--dry-run", "-q"]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run(*words)
        assert not [warning for warning in seen if issubclass(warning.category, RuntimeWarning)], method


def test_a_misspelt_method_is_answered_by_the_nearest_one(small: Path) -> None:
    result = run("combine", small, "--method", "dela", "--dry-run")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("  fix: the nearest name is della, of sum, ")
    assert "choose one of: sum (" in run("combine", small, "--method", "zzz", "--dry-run").stderr


def test_json_contract_and_the_file_is_the_sum(small: Path, other: Path, tmp_path: Path) -> None:
    record = told(f"{small}:0.5", f"{other}:-2", "-o", tmp_path / "out")
    assert record["target"] == str(tmp_path / "out")
    assert (record["method"], record["space"], record["format"]) == ("sum", "core", "peft")
    assert [(one["path"], one["weight"]) for one in record["adapters"]] == [(str(small), 0.5), (str(other), -2.0)]
    assert all(0.5 < one["retained"] < 1 + 1e-12 for one in record["adapters"])  # r 2 + 3 do not fit into 6 × 4
    assert set(record["adapters"][0]["interference"]) == {"before", "after"}
    assert record["total"]["error_to_sum"] < 1e-12
    assert record["total"]["bytes"] == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    found, a, b = (loralens.load(path) for path in (tmp_path / "out", small, other))
    assert record["total"]["parameters"] == found.parameters
    for module in record["modules"]:
        name = module["name"]
        np.testing.assert_allclose(found[name].dense(), 0.5 * a[name].dense() - 2 * b[name].dense(), atol=1e-5)
        assert (module["rank"], module["ranks_before"]) == (found[name].rank, [2, 3])
        assert module["error_to_sum"] < 1e-12


@pytest.mark.parametrize("rule", [["--rank", 2], ["--energy", "0.8"], ["--size", "2KB"], ["--parameters", "0.5"]])
def test_truncation_is_what_compress_makes_of_the_whole_sum(
    small: Path, other: Path, tmp_path: Path, rule: list[str]
) -> None:
    a, b = loralens.load(small), loralens.load(other)
    whole = a - 0.5 * b
    record = told(small, f"{other}:-0.5", "-o", tmp_path / "out", *rule)
    found = loralens.load(tmp_path / "out")
    assert any(found[name].rank < whole[name].rank for name in whole)
    errors = {}
    for module in record["modules"]:
        D, R = whole[module["name"]].dense(), found[module["name"]].dense()
        s = np.linalg.svd(D, compute_uv=False)
        tail = np.linalg.norm(s[module["rank"] :])
        assert np.linalg.norm(D - R) == pytest.approx(tail, rel=1e-4, abs=1e-5)
        assert module["error_to_sum"] == pytest.approx(tail / np.linalg.norm(s), rel=1e-4, abs=1e-6)
        assert module["truncation"] == pytest.approx(module["error_to_sum"], abs=1e-9)
        errors[module["name"]] = tail
    if rule[0] == "--size":
        assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size <= 2000


def test_a_recipe_is_followed_and_round_trips_through_the_file(small: Path, other: Path, tmp_path: Path) -> None:
    arguments = (f"{small}:0.75", f"{other}:2", "--method", "tsv-m", "--lambda", "0.5", "--rank", "3", "-m", "q_proj")
    first = told(*arguments, "-o", tmp_path / "first")
    again = told("--recipe", tmp_path / "first", "-o", tmp_path / "again")
    assert {**first, "target": None} == {**again, "target": None}
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "again")]
    assert files[0] == files[1]
    assert len(loralens.load(tmp_path / "first")) == 3
    toml = tmp_path / "recipe.toml"
    toml.write_text(
        f'method = "tsv-m"\noptions = {{ lam = 0.5 }}\nmodules = ["q_proj"]\ntruncate = {{ rank = 3 }}\n'
        f'[[adapters]]\npath = "{small.as_posix()}"\nweight = 0.75\n[[adapters]]\npath = "other"\nweight = 2\n'
    )
    told("--recipe", toml, "-o", tmp_path / "third")
    one, two = (loralens.load(tmp_path / name) for name in ("first", "third"))
    assert all(np.array_equal(one[name].B, two[name].B) for name in one)


def test_weights_by_glob_in_a_recipe(small: Path, tmp_path: Path) -> None:
    toml = tmp_path / "r.toml"
    toml.write_text(f'[[adapters]]\npath = "{small.as_posix()}"\nweight = 1\nmodules = {{ "*.0.*" = 0.25 }}\n')
    run("combine", "--recipe", toml, "-o", tmp_path / "out")
    found, whole = loralens.load(tmp_path / "out"), loralens.load(small)
    for name in whole:
        factor = 0.25 if ".0." in name else 1.0
        np.testing.assert_allclose(found[name].dense(), factor * whole[name].dense(), rtol=1e-12)


def test_what_cancels_is_zeros_in_the_file_or_gone(small: Path, tmp_path: Path) -> None:
    run("combine", small, f"{small}:-1", "-o", tmp_path / "zero")
    found = loralens.load(tmp_path / "zero")
    assert all(not m.B.any() and not m.A.any() and m.rank == 1 for m in found.modules.values())
    result = run("combine", small, f"{small}:-1", "-o", tmp_path / "none", "--drop-dead")
    assert (result.exit_code, "nothing is left" in result.stderr) == (2, True)
    record = told(small, "--drop-dead", "-o", tmp_path / "alive")
    assert [m["rank"] for m in record["modules"]].count(0) == 1
    assert len(loralens.load(tmp_path / "alive")) == 5


def test_heads_need_a_choice(small: Path, tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        key = "base_model.model.score.weight"
        head = {key: Extra("saved", "score", LazyArray.of(np.full((2, 4), value, np.float32)))}
        adapter = replace(loralens.load(small), extra=head)
        adapter = replace(adapter, config={**(adapter.config or {}), "modules_to_save": ["score"]})
        loralens.save(adapter, tmp_path / name)
    pair = (tmp_path / "one", tmp_path / "two")
    refused = run("combine", *pair, "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert ": score\n" in refused.stderr
    assert "--take" in refused.stderr
    for take, value in ((pair[1], 2.0), ("two", 2.0), ("1", 1.0)):
        told(*pair, "-o", tmp_path / "out", "--take", take, "--overwrite")
        (extra,) = loralens.load(tmp_path / "out").extra.values()
        assert extra.tensor.read()[0, 0] == value
    told(*pair, "-o", tmp_path / "out", "--take", "none", "--overwrite")
    assert not loralens.load(tmp_path / "out").extra
    assert "no such adapter" in run("combine", *pair, "--dry-run", "--take", "three").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SMALL", "nowhere", "-o", "OUT"], "no such file or folder"),
        (["SMALL", "--method", "wrong", "-o", "OUT"], "iso-c (the sum with all singular values made equal"),
        (["SMALL", "SMALL", "--method", "ties", "--density", "0", "-o", "OUT"], "density 0 is not"),
        (["SMALL", "SMALL", "--method", "ties", "--density", "1.5", "-o", "OUT"], "in (0, 1]"),
        (["SMALL", "--density", "0.5", "-o", "OUT"], "sum has no option density"),
        (["SMALL", "--modules", "k_prj", "-o", "OUT"], "the nearest names are"),
        (["SMALL", "-o", "SMALL"], "is where the source is"),
        (["SMALL", "SMALL", "SMALL", "--method", "slerp", "-o", "OUT"], "slerp takes 2 adapters"),
        (["--recipe", "SMALL", "-o", "OUT"], "no recipe is in it"),
        (["SMALL", "--size", "10", "-o", "OUT"], "too few"),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_2(
    small: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    spelled = {"SMALL": small, "OUT": tmp_path / "out"}
    result = run("combine", *(spelled.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "\n  fix: " in result.stderr
    assert not (tmp_path / "out").exists()


def test_adapters_of_two_models_are_named(small: Path, tmp_path: Path) -> None:

    loralens.save(Adapter(modules={"encoder.query": LowRank(np.ones((3, 1)), np.ones((1, 3)))}), tmp_path / "b")
    result = run("combine", small, tmp_path / "b", "--dry-run")
    assert "no module in common" in result.stderr
    assert "6 modules (q_proj, v_proj)" in result.stderr
    loralens.save(Adapter(modules={Q: LowRank(np.ones((3, 1)), np.ones((1, 3)))}), tmp_path / "c")
    result = run("combine", small, tmp_path / "c", "--dry-run")
    assert f"{Q} is 6 × 4 in {small} and 3 × 3 in {tmp_path / 'c'}: they belong to two base models" in result.stderr


def test_an_unknown_strength_is_not_added_up(small: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "adapter_model.safetensors").write_bytes((small / "adapter_model.safetensors").read_bytes())
    result = run("combine", small, tmp_path / "bare", "-o", tmp_path / "out")
    assert (result.exit_code, "give --alpha or --scale" in result.stderr) == (2, True)
    run("combine", tmp_path / "bare", f"{small}:-1", "-o", tmp_path / "out", "--alpha", "8")
    assert all(not m.B.any() for m in loralens.load(tmp_path / "out").modules.values())
