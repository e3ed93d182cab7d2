"""``loralens combine``: exact output on a small adapter, the JSON contract, recipes, every refusal."""

import json
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens import Adapter, LowRank
from loralens.core import Extra, LazyArray
from tests import bases, reference
from tests.cli.command import Command
from tests.conftest import small_adapter
from tests.models import low_rank
from tests.tolerances import DORA_FILE

Q = "model.layers.0.self_attn.q_proj"

run, done, told, refused = Command().run, Command().good, Command("combine").told, Command().refused


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another adapter of the same modules, rank 3, scale −1."""
    modules = {name: low_rank(6, 4, 3, -1, seed=i) for i, name in enumerate(small_adapter())}
    loralens.save(Adapter(modules=modules), tmp_path / "other")
    return tmp_path / "other"


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


def test_a_recipe_is_followed_and_round_trips_through_the_file(small: Path, other: Path, tmp_path: Path) -> None:
    arguments = (f"{small}:0.75", f"{other}:2", "--method", "tsv-m", "--lambda", "0.5", "--rank", "3", "-m", "q_proj")
    first = told(*arguments, "-o", tmp_path / "first")
    again = told("--recipe", tmp_path / "first", "-o", tmp_path / "again")
    assert {**first, "target": None} == {**again, "target": None}
    told(*({"--lambda": "--set", "0.5": "lam=0.5"}.get(each, each) for each in arguments), "-o", tmp_path / "set")
    names = ("first", "again", "set")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in names]
    assert files[0] == files[1] == files[2]
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SMALL", "--method", "wrong", "-o", "OUT"], "iso-c (the sum with all singular values made equal"),
        (["SMALL", "SMALL", "SMALL", "--method", "slerp", "-o", "OUT"], "slerp takes 2 adapters"),
        (["--recipe", "SMALL", "-o", "OUT"], "no recipe is in it"),
        (["SMALL", "--size", "10", "-o", "OUT"], "too few"),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_2(
    small: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    spelled = {"SMALL": small, "OUT": tmp_path / "out"}
    said = refused("combine", *(spelled.get(argument, argument) for argument in arguments))
    assert message in said
    assert "\n  fix: " in said
    assert not (tmp_path / "out").exists()


def test_adapters_of_two_models_are_named(small: Path, tmp_path: Path) -> None:

    loralens.save(Adapter(modules={"encoder.query": LowRank(np.ones((3, 1)), np.ones((1, 3)))}), tmp_path / "b")
    result = run("combine", small, tmp_path / "b", "--dry-run")
    assert "no module in common" in result.stderr
    assert "6 modules (q_proj, v_proj)" in result.stderr


# ---- DoRA, beside a base model

KEY = "base_model.model.{}.lora_magnitude_vector"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return bases.single(tmp_path / "base", bases.tensors(np.float32, size=1.0))


def weights() -> dict[str, np.ndarray]:
    held = bases.tensors(np.float32, size=1.0)
    return {name: held[f"{name}.weight"].astype(np.float64) for name in bases.MODULES}


def saved(folder: Path, seed: int, *, dora: bool = True) -> Path:
    """An adapter of all modules, DoRA or not, with trained lengths."""
    rng, modules, extra = np.random.default_rng(seed), {}, {}
    for name, W in weights().items():
        B, A = (0.3 * rng.standard_normal(shape).astype(np.float32) for shape in ((6, 2), (2, 4)))
        modules[name] = LowRank(B, A, 2.0)
        if dora:
            m = np.linalg.norm(W + modules[name].dense(), axis=1) * (1 + 0.1 * rng.standard_normal(6))
            extra[KEY.format(name)] = Extra("magnitude", name, LazyArray.of(m.astype(np.float32)))
    loralens.save(Adapter(modules=modules, extra=extra), folder)
    return folder


def changes(folder: Path) -> dict[str, np.ndarray]:
    """W' − W of every module, by the definition."""
    adapter, found = loralens.load(folder), {}
    lengths = {e.module: e.tensor.read().astype(np.float64) for e in adapter.extra.values() if e.role == "magnitude"}
    for name, W in weights().items():
        D = adapter[name].dense()
        found[name] = reference.dora(W, D, lengths[name]) - W if name in lengths else D
    return found


@pytest.mark.parametrize("first", [True, False])
def test_dora_with_its_base_is_exact_and_stays_dora(base: Path, tmp_path: Path, first: bool) -> None:
    pair = saved(tmp_path / "a", 1, dora=first), saved(tmp_path / "b", 2, dora=not first)
    result = done("combine", f"{pair[0]}:0.7", f"{pair[1]}:-0.4", "--base", base, "-o", tmp_path / "out")
    assert "1 of 2 adapters is DoRA; the result is DoRA too, exact for this base" in result.stderr
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["use_dora"] is True
    a, b, found = (changes(folder) for folder in (*pair, tmp_path / "out"))
    for name, W in weights().items():
        expected = 0.7 * a[name] - 0.4 * b[name]
        assert np.linalg.norm(found[name] - expected) < 4 * DORA_FILE * np.linalg.norm(W)  # factors are float32 too


def test_dora_cut_and_scaled(base: Path, tmp_path: Path) -> None:
    pair = saved(tmp_path / "a", 3), saved(tmp_path / "b", 4)
    record = told(*pair, "--base", base, "--rank", 1, "-o", tmp_path / "cut")
    a, b, cut = (changes(folder) for folder in (*pair, tmp_path / "cut"))
    for module in record["modules"]:
        name = module["name"]
        S = a[name] + b[name]
        assert module["rank"] == 1
        assert module["error_to_sum"] == pytest.approx(np.linalg.norm(cut[name] - S) / np.linalg.norm(S), abs=1e-5)
    done("scale", pair[0], "--by", 0.5, "--base", base, "-o", tmp_path / "half")
    half = changes(tmp_path / "half")
    assert all(np.linalg.norm(half[n] - 0.5 * a[n]) < 4 * DORA_FILE * np.linalg.norm(W) for n, W in weights().items())


def test_where_the_product_alone_is_measured_it_is_said(base: Path, tmp_path: Path) -> None:
    dora, said = saved(tmp_path / "a", 1), "what is measured is ΔW = scale·B·A alone"
    for verb, *more in (("spectrum",), ("amplify", "--base", base, "--no-top"), ("inspect",), ("doctor",)):
        assert said in done(verb, dora, *more).output
    done("merge", dora, "--base", base, "-o", tmp_path / "merged")
    assert said not in done("merge", dora, "--base", base, "--dry-run").output
    assert said not in done("verify", tmp_path / "merged", "--base", base, "--adapter", dora).output


def test_dora_without_its_base_says_the_way_out(tmp_path: Path, base: Path) -> None:
    pair = saved(tmp_path / "a", 5), saved(tmp_path / "b", 6)
    for arguments, message in (
        ([*pair], "--base"),
        ([pair[0], "--rank", 1], "loralens compress"),
        ([*pair, "--base", base, "--method", "ties"], "--method sum or average"),
        ([*pair, "--base", tmp_path / "a"], str(tmp_path / "a")),
    ):
        said = refused("combine", *arguments, "-o", tmp_path / "out")
        assert message in said
        assert "\n  fix: " in said
        assert not (tmp_path / "out").exists()
    assert done("combine", pair[0], "-o", tmp_path / "same").exit_code == 0  # alone, as it is
    assert changes(tmp_path / "same")[Q].tobytes() == changes(pair[0])[Q].tobytes()
