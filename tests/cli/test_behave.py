"""``loralens behave``: the table, the JSON contract, and what it says of what it could not do."""

import json
from pathlib import Path

import pytest

import loralens
from tests import models
from tests.cli.command import Command

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
    result = run("--model", home / "llama", home / "one", home / "two", "--data", home / "texts.jsonl", "--json")
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


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (["one", "one"], "given twice"),
        (["zero"], "no weight in the base"),
        (["nowhere"], "nowhere: "),
    ],
)
def test_what_is_wrong_is_one_message(home: Path, adapters: list[str], message: str) -> None:
    paths = [home / name for name in adapters]
    result = run("--model", home / "llama", *paths, "--data", home / "texts.jsonl")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "\n  fix: " in result.stderr
    assert result.stdout == ""
