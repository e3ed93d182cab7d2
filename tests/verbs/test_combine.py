"""``loralens.combine`` from Python: paths and objects, weights, the result beside the command's, wrong values."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens import Adapter
from loralens.core import Extra, LazyArray, Strength
from loralens.core.stored import Recipe
from tests.cli.command import Command
from tests.conftest import small_adapter
from tests.draws import draw_adapter

CONFORMANCE = Path(__file__).parent.parent / "conformance"
Q, V = "m.0.q_proj", "m.0.v_proj"

told = Command("combine").told


def adapter(seed: int, rank: int = 2) -> Adapter:
    return draw_adapter(seed, {Q: (6, 4), V: (6, 4)}, rank, 0.5)


@pytest.fixture
def a() -> Adapter:
    return adapter(1)


@pytest.fixture
def b() -> Adapter:
    return adapter(2, rank=1)


@pytest.fixture
def files(a: Adapter, b: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with both as ``a`` and ``b``, in which the test works."""
    loralens.save(a, tmp_path / "a")
    loralens.save(b, tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def entries(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_sum(combined: Adapter, *terms: tuple[Adapter, float]) -> None:
    assert set(combined) == {Q, V}
    for name in combined:
        expected = sum(weight * term[name].dense() for term, weight in terms)
        np.testing.assert_allclose(combined[name].dense(), expected, atol=1e-6)


def test_adapters_and_weights_as_people_guess_them(a: Adapter, b: Adapter, files: Path) -> None:
    before = entries(files)
    equal = [
        loralens.combine("a", "b"),
        loralens.combine(["a", "b"]),
        loralens.combine([a, b]),
        loralens.combine(a, Path("b")),
        loralens.combine([("a", 1), (b, 1.0)]),
        loralens.combine({"a": 1, "b": 1}),
    ]
    for result in equal:
        assert_sum(result.adapter, (a, 1), (b, 1))
        assert result.output is None
    for result in (
        loralens.combine({"a": 0.5, Path("b"): -2.0}),
        loralens.combine([(a, 0.5), ("b", -2)]),
        loralens.combine(("a", np.float32(0.5)), (b, Strength(-2.0))),
    ):
        assert_sum(result.adapter, (a, 0.5), (b, -2))
        json.dumps(result.record())
    assert_sum(loralens.combine("a").adapter, (a, 1))
    assert entries(files) == before


def test_weights_by_module(a: Adapter, b: Adapter) -> None:
    result = loralens.combine([(a, 0.5), (b, {"v_proj": 3.0})]).adapter
    np.testing.assert_allclose(result[Q].dense(), 0.5 * a[Q].dense() + b[Q].dense(), atol=1e-6)
    np.testing.assert_allclose(result[V].dense(), 0.5 * a[V].dense() + 3 * b[V].dense(), atol=1e-6)
    assert list(loralens.combine(a, b, modules="q_proj").adapter) == [Q]
    assert list(loralens.combine(a, b, modules=["q_proj", "v_proj"]).adapter) == [Q, V]


@pytest.mark.usefixtures("files")
def test_a_rank_beside_a_rule_is_a_ceiling_and_the_recipe_has_it() -> None:
    result = loralens.combine("a", "b", energy=1, rank=3)
    assert {module.rank for module in result.adapter.modules.values()} == {3}
    assert result.recipe.truncate == {"energy": 1, "rank": 3}
    again = loralens.combine(recipe=Recipe.of(result.recipe.record()))
    assert {module.rank for module in again.adapter.modules.values()} == {3}


def test_a_dry_run_writes_nothing_and_checks_the_target(files: Path) -> None:
    before = entries(files)
    result = loralens.combine("a", "b", output="out", dry_run=True)
    assert result.output is None
    assert result.record()["target"] is None
    assert result.conclusion()[0].startswith("Would write out: ")
    with pytest.raises(loralens.OptionError, match="is where the source is"):
        loralens.combine("a", "b", output="a", dry_run=True)
    assert entries(files) == before


def test_the_columns(a: Adapter, b: Adapter) -> None:
    result = loralens.combine(a, (b, 0.5), method="iso-c", rank=2)
    modules, adapters = result.tables()
    assert [column.title for column in modules.shown] == ["module", "out × in", "r", "r'", "truncation", "error"]
    assert [column.name for column in adapters.columns if column.json] == [
        "path", "retained", "gain", "interference_before", "interference_after",
    ]  # fmt: skip
    assert "truncation" not in [column.title for column in loralens.combine(a, b).tables()[0].shown]
    assert result.total.shares[0].gain == result.record()["adapters"][0]["gain"]
    assert "<table" in result._repr_html_()


@pytest.mark.parametrize(
    "options",
    [{"method": "sum"}, {"seed": 0}, {"strength": 0.0}, {"settings": {"mu": 1}}, {"rank": 1}, {"uniform": True}],
)
def test_a_recipe_and_other_options_exclude_each_other(files: Path, options: Mapping[str, Any]) -> None:
    (name,) = options
    with pytest.raises(loralens.OptionError, match=f"{name}=(True)? and recipe= exclude each other"):
        loralens.combine(recipe="made", **options)
    with pytest.raises(loralens.OptionError, match="ADAPTER and recipe= exclude each other"):
        loralens.combine("a", recipe="made")


def test_whose_head_is_taken(a: Adapter, b: Adapter, files: Path) -> None:
    def headed(plain: Adapter, value: float) -> Adapter:
        head = Extra("saved", "score", LazyArray.of(np.full((2, 4), value, "f")))
        return Adapter(modules=plain.modules, extra={"base_model.model.score.weight": head})

    one, two = headed(a, 1.0), headed(b, 2.0)
    with pytest.raises(loralens.MismatchError, match="take="):
        loralens.combine(one, two)
    for take, value in ((one, 1.0), (two, 2.0), ("1", 1.0), ("adapter 2", 2.0)):
        (head,) = loralens.combine(one, two, take=take).adapter.extra.values()
        assert head.tensor.read()[0, 0] == value
    assert not loralens.combine(one, two, take="none").adapter.extra
    assert not loralens.subtract(one, two, take="none").adapter.extra
    with pytest.raises(loralens.OptionError, match="not among those combined"):
        loralens.combine(one, two, take=a)
    with pytest.raises(loralens.OptionError, match="no such adapter here"):
        loralens.combine(one, two, take="three")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "quite another"}, "no method 'quite another'"),
        ({"dtype": "int8"}, "dtype 'int8' is not possible"),
        ({"density": 0.5}, "sum has no option density"),
        ({"method": "ties", "density": 2}, "density 2 is not a number in"),
        ({"strength": float("nan")}, "strength nan is not possible"),
        ({"method": "ties", "settings": {"whole": "no"}}, "whole 'no' is not a number"),
        ({"method": "ties", "settings": ["whole=0"]}, "is not a mapping of names to numbers"),
        ({"modules": "k_proj"}, "no module matches 'k_proj'"),
        ({"alpha": 8.0}, "says how to read a file"),
    ],
)
def test_a_wrong_value_is_refused_and_says_what_is_possible(
    a: Adapter, b: Adapter, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(loralens.OptionError, match=message) as error:
        loralens.combine(a, b, **options)
    assert error.value.fix


def test_alpha_counts_only_where_a_file_does_not_say_its_own(small: Path, files: Path) -> None:
    (files / "bare").mkdir()
    (files / "bare" / "adapter_model.safetensors").write_bytes((small / "adapter_model.safetensors").read_bytes())
    zero = loralens.combine(("bare", 1), (small_adapter(), -1), alpha=8.0).adapter
    assert all(not module.B.any() for module in zero.modules.values())
    with pytest.raises(loralens.OptionError, match="does not state its α"):
        loralens.combine("bare", small)


@pytest.mark.parametrize(
    "file",
    [
        "xlabs/lora.safetensors",
        "litgpt",
        "plain-pairs/adapter_model.safetensors",
        "lycoris-loha",
        "gguf-llama-no-heads/adapter.gguf",
    ],
)
def test_without_an_output_a_dialect_that_is_only_read_is_no_obstacle(file: str) -> None:
    adapter = loralens.load(CONFORMANCE / file, strict=False)
    result = loralens.scale(adapter, 0.5)
    for name, module in adapter.items():
        np.testing.assert_allclose(result.adapter[name].dense(), 0.5 * module.dense(), rtol=1e-6)
    json.dumps(result.record())
    assert result.sentences()
    assert set(loralens.drop(adapter, list(adapter)[:1]).adapter) == {*list(adapter)[1:]}
