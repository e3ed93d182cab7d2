"""Texts that a model is not shown in full: counted, said on stderr, and in the JSON of every command that runs one."""

import json
from pathlib import Path

import pytest

from tests import models
from tests.cli.command import Command

pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("quiet_torch")

call = Command()
WORDS = [len(text.split()) for text in models.TEXTS]  # one token a word: 6, 10, 2, 7
POSITIONS = 32  # of models.llama


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    home = tmp_path_factory.mktemp("cut")
    llama = models.llama()
    models.folder(llama, home / "llama")
    models.saved(models.adapter(llama, ("q_proj",)), home / "adapter")
    models.jsonl(home / "texts.jsonl")
    models.jsonl(home / "long.jsonl", texts=["the cat " * 20, "it ran"])
    return home


COMMANDS = {
    "behave": "behave --model {home}/llama {home}/adapter",
    "calibrate": "calibrate --model {home}/llama --adapter {home}/adapter -o {out}.safetensors",
    "evaluate": "evaluate {home}/adapter --model {home}/llama --task causal-lm",
    "train": "train --model {home}/llama --task causal-lm --targets q_proj --rank 2 --steps 1 --batch 4 -o {out}",
}


def told(command: str, home: Path, out: Path, *more: object) -> tuple[dict[str, int], str]:
    """What the JSON says of the cut, and what stderr says."""
    words = COMMANDS[command].format(home=home, out=out).split()
    result = call.good(*words, "--threads", 1, *more, "--json")
    record = json.loads(result.stdout)
    where = {"behave": lambda: record["data"], "evaluate": lambda: {"cut": record["cut"][0]}}
    return where.get(command, lambda: record)()["cut"], result.stderr


@pytest.mark.some(2)
@pytest.mark.parametrize("length", [6, 7, 256])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_left_out_is_counted_and_said(command: str, length: int, home: Path, tmp_path: Path) -> None:
    cut, stderr = told(command, home, tmp_path / "out", "--data", home / "texts.jsonl", "--length", length)
    beyond = [count - length for count in WORDS if count > length]
    assert cut == {"length": min(length, POSITIONS), "texts": len(beyond), "tokens": sum(beyond)}
    if not beyond:
        assert "longer" not in stderr
        return
    texts = {
        6: "2 of 4 texts are longer than 6 tokens; 5 tokens are",
        7: "1 of 4 texts is longer than 7 tokens; 3 tokens are",
    }
    assert f"texts.jsonl: {texts[length]} left out (a larger --length keeps more)\n" in stderr


@pytest.mark.some(2)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_length_for_which_the_model_has_no_positions_is_said(command: str, home: Path, tmp_path: Path) -> None:
    for length, said in ((POSITIONS, 0), (64, 1)):
        files = ("--data", home / "texts.jsonl", *(("--eval", home / "texts.jsonl") if command == "train" else ()))
        _, stderr = told(command, home, tmp_path / f"out{length}", *files, "--length", length)
        assert stderr.count(f"--length {length} is too large: the model has positions for 32 tokens") == said
