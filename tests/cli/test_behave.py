"""``loralens behave``: the table, the JSON contract, and what it says of what it could not do."""

import json
from pathlib import Path

import pytest

import loralens
from tests import models
from tests.cli.command import Command
from tests.formats.conftest import quiet_torch as quiet_torch  # a fixture: found here by its name

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("quiet_torch")

run = Command("behave", "--threads", "1").run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    home = tmp_path_factory.mktemp("home")
    llama, bert = models.llama(), models.bert()
    models.folder(llama, home / "llama")
    models.folder(bert, home / "bert")
    models.saved(models.adapter(llama, ("q_proj", "up_proj")), home / "one")
    models.saved(models.adapter(llama, ("down_proj",), seed=1), home / "two")
    models.saved(models.adapter(bert, ("query",), scale=0.0), home / "zero")
    models.jsonl(home / "texts.jsonl")
    return home


def test_json_keeps_its_contract(home: Path) -> None:
    result = run(
        "--model", home / "llama", "--adapters", home / "one", home / "two", "--data", home / "texts.jsonl", "--json"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    record = json.loads(result.stdout)
    assert (record["loralens"], record["model"], record["head"]) == (
        loralens.__version__,
        str(home / "llama"),
        "causal",
    )
    cut = {"length": 32, "texts": 0, "tokens": 0}
    assert record["data"] == {"file": str(home / "texts.jsonl"), "texts": 4, "cut": cut, "positions": 25, "states": 25}
    assert record["adapters"] == [
        {"name": name, "path": str(home / name), "not_applied": {}, "never_called": [], "rounded": []}
        for name in ("one", "two")
    ]
    assert [(c["first"], c["second"]) for c in record["contrasts"]] == [
        ("base", "one"),
        ("base", "two"),
        ("one", "two"),
    ]
    for contrast in record["contrasts"]:
        assert set(contrast) == {"first", "second", "kl", "logits", "agreement", "hidden"}
        assert contrast["kl"] > 0
        assert 0 <= contrast["agreement"] <= 1
        assert len(contrast["hidden"]) == 3
        assert contrast["hidden"][0] == 0


def test_the_conclusion_on_several_adapters_names_the_one_that_changes_most_and_least(home: Path) -> None:
    args = ("--model", home / "llama", home / "two", home / "one", "--data", home / "texts.jsonl")
    record = json.loads(run(*args, "--json").stdout)["contrasts"]
    from_base = sorted((row for row in record if row["first"] == "base"), key=lambda row: row["kl"])
    least, most = (
        f"KL {row['kl']:.4g} nats, another first choice in {100 * (1 - row['agreement']):.3g} %" for row in from_base
    )
    (conclusion,) = run(*args, "--quiet").stdout.splitlines()
    assert conclusion == (
        f"Of 2 adapters {from_base[1]['second']} changes the outputs most ({most} of the tokens) "
        f"and {from_base[0]['second']} least ({least})."
    )


def test_an_encoder_and_an_adapter_that_does_nothing(home: Path) -> None:
    result = run("--model", home / "bert", "--adapters", home / "zero", "--data", home / "texts.jsonl")
    assert result.exit_code == 0
    assert "KL" not in result.stdout
    lines = result.stdout.splitlines()
    assert lines[0] == "zero moves the last hidden states by 0."
    assert lines[4].split() == ["base", "zero", "0"]


def test_a_head_that_the_model_lacks_is_said(home: Path, tmp_path: Path) -> None:
    import numpy as np

    from loralens.core.adapter import Adapter, Extra
    from loralens.core.lazy import LazyArray

    adapter = models.adapter(models.bert(), ("query",))
    key = "base_model.model.classifier.weight"
    extra = {key: Extra("saved", "classifier", LazyArray.of(np.ones((2, 16), np.float32)))}
    models.saved(
        Adapter(modules=adapter.modules, extra=extra, config={"modules_to_save": ["classifier"]}), tmp_path / "headed"
    )
    result = run("--model", home / "bert", "--adapters", tmp_path / "headed", "--data", home / "texts.jsonl")
    assert result.exit_code == 0
    assert (
        f"warning: headed: {key} (saved: the model has no parameter of this name and size) is not applied"
        in result.stderr
    )


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (["one", "one"], "given twice"),
        (["zero"], "no weight in the base"),
        (["nowhere"], "no such file"),
    ],
)
def test_what_is_wrong_is_one_message(home: Path, adapters: list[str], message: str) -> None:
    paths = [home / name for name in adapters]
    result = run("--model", home / "llama", "--adapters", *paths, "--data", home / "texts.jsonl")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "\n  fix: " in result.stderr
    assert result.stdout == ""
