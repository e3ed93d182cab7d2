"""``loralens behave``: the table, the JSON contract, and what it says of what it could not do."""

from pathlib import Path

import pytest

from tests import models
from tests.cli.command import Command

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("quiet_torch")

refused = Command("behave", "--threads", "1").refused


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    home = tmp_path_factory.mktemp("home")
    llama, bert = models.llama(), models.bert()
    models.folder(llama, home / "llama")
    models.folder(bert, home / "bert")
    models.saved(models.adapter(llama, ("q_proj", "up_proj")), home / "one")
    models.saved(models.adapter(llama, ("down_proj",), seed=1), home / "two")
    models.saved(models.adapter(bert, ("query",)), home / "zero")
    models.jsonl(home / "texts.jsonl")
    return home


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (["one", "one"], "given twice"),
        (["zero"], "query"),
        (["nowhere"], "nowhere: "),
    ],
)
def test_what_is_wrong_is_one_message(home: Path, adapters: list[str], message: str) -> None:
    paths = [home / name for name in adapters]
    said = refused("--model", home / "llama", *paths, "--data", home / "texts.jsonl")
    assert message in said
    assert "\n  fix: " in said
