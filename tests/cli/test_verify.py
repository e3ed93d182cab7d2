"""``loralens verify``: whether a model holds an adapter, as a table, as JSON and as an exit code."""

import json
from pathlib import Path

import numpy as np
import pytest

import loralens
from tests.bases import MODULES, sharded, single, stored, tensors
from tests.cli.test_merge import done, expected, refused, run
from tests.conftest import small_adapter


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return single(tmp_path / "base", tensors())


def test_a_rounding_that_is_given_goes_before_the_certificate(small: Path, base: Path, tmp_path: Path) -> None:
    # At this strength no sum is a number of float16.
    merged, scaled = tmp_path / "out", f"{small}:0.6137"
    options = ["--rounding", "stochastic", "--seed", 4, "--dtype", "f16"]
    done("merge", scaled, "--base", base, "-o", merged, *options)
    words = ["verify", merged, "--base", base, "--adapter", scaled, "--json"]
    assert json.loads(done(*words).stdout)["verdict"] == "exact"
    assert json.loads(run(*words, "--seed", 5).stdout)["verdict"] != "exact"
    assert json.loads(run(*words, "--rounding", "nearest").stdout)["verdict"] != "exact"


def verdict(merged: Path, base: Path, *adapters: object) -> tuple[str, int]:
    given = [word for one in adapters for word in ("--adapter", one)]
    result = run("verify", merged, "--base", base, *given, "--json")
    return json.loads(result.stdout)["verdict"], result.exit_code


def test_a_merge_of_another_tool_in_other_shards_is_rounded(small: Path, base: Path, tmp_path: Path) -> None:
    held = tensors()
    twice = dict(held)
    for name, update in small_adapter().modules.items():
        W = held[f"{name}.weight"]
        twice[f"{name}.weight"] = W + (update.dense() * (1 + 2**-9)).astype(W.dtype)
    other = sharded(tmp_path / "other", twice)
    assert verdict(other, base, small) in (("rounded", 0), ("exact", 0))
    wide = sharded(tmp_path / "wide", {k: v.astype(np.float32) for k, v in expected(held).items()})
    assert verdict(wide, base, small) == ("rounded", 0)


def test_the_headline_is_no_better_than_the_worst_module(small: Path, base: Path, tmp_path: Path) -> None:
    done("merge", small, "--base", base, "-o", tmp_path / "out")
    held, before = stored(tmp_path / "out"), tensors()
    gone = f"{MODULES[1]}.weight"
    single(tmp_path / "cut", {**held, gone: before[gone]})
    looked = ("verify", tmp_path / "cut", "--base", base, "--adapter", small)
    result = run(*looked)
    assert result.exit_code == 1
    where = f"in 1 of 6 modules ({MODULES[1]})"
    headline = f"{tmp_path / 'cut'} does not hold {small} {where}: the weights are those of the base."
    assert result.stdout.splitlines()[:2] == [headline, f"It is absent in 1 module ({MODULES[1]})."]
    single(tmp_path / "more", {**held, gone: held[gone] * 2 - before[gone]})
    result = run(*looked[:1], tmp_path / "more", *looked[2:])
    assert result.exit_code == 1
    start = f"{tmp_path / 'more'} does not hold {small} {where} as it is, but the same directions at 2 of the strength"
    assert result.stdout.startswith(start)


def test_an_update_that_rounding_swallows_is_absent(base: Path, tmp_path: Path) -> None:
    adapter = small_adapter()
    modules = {name: replace_scale(module, 1e-6) if name == MODULES[0] else module for name, module in adapter.items()}
    loralens.save(loralens.Adapter(modules=modules), tmp_path / "faint")
    for options, code in (((), 1), (("--dtype", "f32"), 0)):
        done("merge", tmp_path / "faint", "--base", base, "-o", tmp_path / f"out{code}", *options)
        result = run("verify", tmp_path / f"out{code}", "--base", base, "--adapter", tmp_path / "faint")
        assert result.exit_code == code
        assert result.stdout.splitlines()[0].endswith(
            "exactly."
            if not code
            else f"in 1 of 6 modules ({MODULES[0]}): rounding to the dtype of the model takes the update."
        )
        assert ("every bit is what this merge writes, and rounding takes the rest" in result.stdout) == bool(code)


def replace_scale(module: loralens.LowRank, factor: float) -> loralens.LowRank:
    return loralens.LowRank(module.B, module.A, module.scale * factor)


def test_other_models_are_errors(small: Path, base: Path, tmp_path: Path) -> None:
    less = single(tmp_path / "less", {key: array for key, array in tensors().items() if ".10." not in key})
    assert "has no model.layers.10.self_attn.q_proj.weight" in refused(
        "verify", less, "--base", base, "--adapter", small
    )
    assert "layers.10.self_attn.q_proj" in refused("verify", base, "--base", less, "--adapter", small)
