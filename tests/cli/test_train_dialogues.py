"""``loralens train`` on instruction data: how it is read, learned and evaluated."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from loralens import FormatError
from loralens.verbs.models.texts import read_texts
from tests import models
from tests.cli.command import Command
from tests.training.test_dialogues import PLAIN

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quiet_torch")

TRAIN = Command("train", "--threads", "1")
PAIRS = [
    {"prompt": "the cat sat on ", "completion": "the mat"},
    {"prompt": "a dog ran ", "completion": "under the tree"},
    {"prompt": "it ", "completion": "slept"},
    {"prompt": "the dog sat and then ", "completion": "the cat ran"},
]
TALKS = [
    {"messages": [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["completion"]}]}
    for pair in PAIRS
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    home = tmp_path_factory.mktemp("home")
    models.folder(models.llama(), home / "llama")
    (home / "llama" / "chat_template.jinja").write_text(PLAIN, encoding="utf-8")
    models.folder(models.llama(), home / "silent")
    for name, records in (("pairs", PAIRS), ("talks", TALKS)):
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        (home / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    with (home / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(PAIRS)
    return home


def speak(home: Path, data: str | Path, target: Path, *more: object, model: str = "llama") -> list[object]:
    files = ("--model", home / model, "--data", home / data, "--eval", home / data, "--task", "causal-lm", "-o", target)
    return [*files, "--targets", "q_proj,v_proj", "--rank", 2, "--batch", 4, "--steps", 3, "--lr", 0.01, *more]


def mean_loss(home: Path, *, masked: bool) -> float:
    """The loss of the completions, or of everything, by the model itself, one dialogue at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(home / "llama")
    tokenizer = AutoTokenizer.from_pretrained(home / "llama")
    total, count = 0.0, 0
    for pair in PAIRS:
        ids = tokenizer(pair["prompt"] + pair["completion"] + "[END]", return_tensors="pt")["input_ids"]
        start = len(tokenizer(pair["prompt"])["input_ids"]) if masked else 1
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
        total -= float(sum(logs[place - 1, ids[0, place]] for place in range(start, ids.shape[1])))
        count += ids.shape[1] - start
    return total / count


@pytest.mark.some(1)
@pytest.mark.parametrize(("option", "masked"), [("--mask-prompt", True), ("--no-mask-prompt", False)])
def test_the_loss_is_that_of_the_completions(home: Path, tmp_path: Path, option: str, masked: bool) -> None:
    said = TRAIN.told(*speak(home, "pairs.jsonl", tmp_path / "a", option))
    assert said["evaluations"][0]["loss"] == pytest.approx(mean_loss(home, masked=masked), rel=1e-5)
    assert said["evaluations"][-1]["loss"] < said["evaluations"][0]["loss"]


def test_conversations_are_learned_and_evaluated_and_need_a_template(home: Path, tmp_path: Path) -> None:
    said = TRAIN.told(*speak(home, "talks.jsonl", tmp_path / "a", "--backend", "core"))
    words = ("--model", home / "llama", "--task", "causal-lm", "--data", home / "talks.jsonl", "--threads", 1)
    again = Command("evaluate").told(tmp_path / "a", *words)
    assert again["adapters"][0]["loss"] == pytest.approx(said["evaluations"][-1]["loss"], rel=1e-5)
    assert math.isfinite(said["evaluations"][-1]["loss"])
    refused = TRAIN.refused(*speak(home, "talks.jsonl", tmp_path / "b", "--backend", "core", model="silent"))
    assert "text 1: the tokenizer has no chat template" in refused


def test_what_is_cut_off_is_said(home: Path, tmp_path: Path) -> None:
    stderr = TRAIN.good(*speak(home, "pairs.jsonl", tmp_path / "a", "--length", 4)).stderr
    assert "pairs.jsonl: 3 of 4 texts are longer than 4 tokens" in stderr
    assert "pairs.jsonl: of 2 dialogues nothing is learned, since what would be is cut off" in stderr
    assert "nothing is left to learn" in TRAIN.refused(*speak(home, "pairs.jsonl", tmp_path / "b", "--length", 1))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "the cat"}, 'has no "text" (it has prompt)'),
        ({"prompt": "the cat", "completion": [{"role": "assistant", "content": "ran"}]}, "are of two kinds"),
        ({"messages": [{"role": "user", "content": "the cat"}]}, "has no message of the assistant"),
        ({"messages": [{"content": "a"}]}, 'message 1 of "messages" has no "role"'),
    ],
)
def test_what_is_no_dialogue_is_said_with_its_line(home: Path, tmp_path: Path, record: Any, message: str) -> None:
    (tmp_path / "d.jsonl").write_text(f"{json.dumps(PAIRS[0])}\n{json.dumps(record)}\n", encoding="utf-8")
    said = TRAIN.refused(*speak(home, tmp_path / "d.jsonl", tmp_path / "a"))
    assert "d.jsonl: line 2" in said
    assert message in said


def test_other_uses_of_texts_say_that_they_take_none(home: Path) -> None:
    adapter = models.saved(models.adapter(models.llama(), ("q_proj",)), home / "adapter")
    words = ("--model", home / "llama", "--data", home / "talks.jsonl", "--threads", 1)
    assert "holds dialogues" in Command("calibrate").refused("--adapter", adapter, *words, "-o", home / "m.safetensors")


@pytest.mark.live
def test_one_split_is_read_and_of_several_each_is_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(TALKS)
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "alone")
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "two")
    assert [text.dialogue for text in read_texts(tmp_path / "alone", dialogues=True)] == TALKS
    with pytest.raises(FormatError, match="holds several splits") as refused:
        read_texts(tmp_path / "two", dialogues=True)
    assert f"{tmp_path / 'two' / 'train'}, {tmp_path / 'two' / 'test'}" in refused.value.fix
    assert len(read_texts(tmp_path / "two" / "test", dialogues=True)) == len(TALKS)


@pytest.mark.live
@pytest.mark.parametrize("data", ["pairs.jsonl", "talks.jsonl"])
def test_packed_rows_are_learned_and_evaluated_as_their_texts_are(home: Path, tmp_path: Path, data: str) -> None:
    result = TRAIN.good(*speak(home, data, tmp_path / "a", "--pack", "--length", 30, "--evaluate-every", 1))
    assert "packed 4 texts into " in result.stderr
    # One step holds all texts, and its loss is taken before the update, as the first evaluation is.
    lines = (tmp_path / "a" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line) for line in lines]
    rows = int(result.stderr.partition("into ")[2].partition(" row")[0])
    if 4 % rows == 0:  # every row is in a step equally often
        first = next(line["loss"] for line in logged if "loss" in line)
        assert first == pytest.approx(logged[0]["evaluation"]["loss"], rel=1e-5)
    plan = TRAIN.good(*speak(home, data, tmp_path / "b", "--pack", "--dry-run"))
    assert "steps of 4 rows" in plan.stdout


TURN = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look"}}]}
FOREIGN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"conversations": [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "ran"}], "system": "mat"},
        {
            "messages": [
                {"role": "system", "content": "mat"},
                {"role": "user", "content": "the cat"},
                {"role": "assistant", "content": "ran"},
            ]
        },
    ),
    (
        {"instruction": "look", "input": "the cat", "output": "it ran"},
        {
            "prompt": [{"role": "user", "content": "look\n\nthe cat"}],
            "completion": [{"role": "assistant", "content": "it ran"}],
        },
    ),
    # A call of a tool has no content, and its tools are kept, also as the JSON of a table.
    (
        {"messages": [{"role": "user", "content": "a"}, {**TURN, "content": None}], "tools": '[{"name": "look"}]'},
        {"messages": [{"role": "user", "content": "a"}, {**TURN, "content": ""}], "tools": [{"name": "look"}]},
    ),
]


@pytest.mark.parametrize(("record", "wanted"), FOREIGN)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_records_of_others_become_dialogues(record: Any, wanted: Any, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"texts{suffix}"
    path.write_text(json.dumps([record] if suffix == ".json" else record, indent=None), encoding="utf-8")
    assert [text.dialogue for text in read_texts(path, dialogues=True)] == [wanted]


def test_an_empty_completion_is_left_out_and_counted(home: Path, tmp_path: Path) -> None:
    lines = [*PAIRS, {"prompt": "a", "completion": " "}, {"instruction": "a", "output": ""}]
    (tmp_path / "d.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    result = TRAIN.good(*speak(home, tmp_path / "d.jsonl", tmp_path / "a", "--dry-run"))
    assert "d.jsonl: 2 with an empty completion left out" in result.stderr


def test_without_trl_one_message_says_what_to_install(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loralens.verbs.runs.training_options.find_spec", lambda name: None)
    said = TRAIN.refused(*speak(home, "talks.jsonl", tmp_path / "a"))
    assert "training by TRL (--backend trl) needs trl and peft" in said
    assert "pip install" in said
    assert not (tmp_path / "a.unfinished").exists()
