"""``train``, ``evaluate`` and ``behave`` from Python: objects beside paths, and the JSON of the commands."""

import csv
import json
import logging
import pickle
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens.errors import OptionError
from tests import models
from tests.cli.command import Command
from tests.formats.conftest import quiet_torch as quiet_torch  # a fixture: found here by its name

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quiet_torch")

LABELS = ["x", "y", "y", "x"]
PAIRS = list(zip(models.TEXTS, LABELS, strict=True))
SHORT: dict[str, Any] = {"rank": 2, "batch": 4, "steps": 2, "lr": 0.05, "threads": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    home = tmp_path_factory.mktemp("home")
    models.folder(models.llama(), home / "llama")
    models.folder(models.bert("BertForSequenceClassification", num_labels=2, id2label={0: "x", 1: "y"}), home / "bert")
    models.jsonl(home / "d.jsonl", label=LABELS)
    for seed in (0, 1):
        models.saved(models.adapter(models.llama(), ("q_proj", "down_proj"), seed=seed), home / f"l{seed}")
    return home


def told(verb: str, *words: object) -> Any:
    """The JSON of a command."""
    return json.loads(Command(verb, "--threads", "1").good(*words, "--json").stdout)


def plain(result: Any) -> Any:
    """The record of a result as JSON has it."""
    return {"loralens": loralens.__version__, **json.loads(json.dumps(result.record()))}


def state(model: Any) -> dict[str, Any]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


# --- evaluate ---


def test_evaluate_gives_the_json_of_the_command_for_paths_and_objects(home: Path) -> None:
    paths, how = [home / "l0", home / "l1"], {"task": "causal-lm", "data": home / "d.jsonl", "threads": 1}
    result = loralens.evaluate(*paths, model=home / "llama", **how)  # type: ignore[arg-type]
    words = ("--model", home / "llama", "--task", "causal-lm", "--data", home / "d.jsonl")
    assert plain(result) == told("evaluate", *paths, *words)
    assert result[str(paths[0])] == result.evaluations[0].measures
    objects = [loralens.load(path) for path in paths]
    model = models.llama(), models.tokenizer()
    before = state(model[0])
    again = loralens.evaluate(objects, model=model, task="causal-lm", data=list(models.TEXTS), threads=1)
    assert [one.measures for one in again.evaluations] == [one.measures for one in result.evaluations]
    assert [one.path for one in again.evaluations] == ["adapter 1", "adapter 2"]
    assert (again.model, again.data) == ("LlamaForCausalLM", "texts")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model[0].state_dict().items())
    assert repr(again) == "EvaluationResult(2 evaluations of causal-lm on texts)"
    assert loralens.evaluate(model=model, task="causal-lm", data=["it ran"], threads=1).evaluations[0].path is None


def test_a_classifier_object_is_measured_by_its_own_labels(home: Path) -> None:
    model = models.bert("BertForSequenceClassification", num_labels=2, id2label={0: "x", 1: "y"}), models.tokenizer()
    result = loralens.evaluate(model=model, task="classification", data=PAIRS, threads=1)
    words = ("--model", home / "bert", "--task", "classification", "--data", home / "d.jsonl")
    assert result[None] == {
        name: value
        for name, value in told("evaluate", *words)["adapters"][0].items()
        if name not in ("path", "parameters")
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"task": "causal"},
            "task 'causal' is not possible\n  fix: choose one of classification, causal-lm, masked-lm",
        ),
        ({"dtype": "float16"}, "dtype 'float16' is not possible"),
        ({"batch": 0}, "batch 0 is not possible\n  fix: give 1 or more"),
        ({"data": "nothing.jsonl"}, "nothing.jsonl: no such file"),
        ({"device": "nonsense"}, "--device nonsense"),
    ],
)
def test_wrong_values_of_evaluate_are_one_message(home: Path, options: dict[str, Any], message: str) -> None:
    given = {"model": home / "llama", "task": "causal-lm", "data": home / "d.jsonl", "threads": 1} | options
    with pytest.raises(OptionError) as raised:
        loralens.evaluate(**given)
    assert message in str(raised.value)


# --- behave ---


def test_behave_gives_the_json_of_the_command_in_either_spelling(home: Path) -> None:
    paths = [home / "l0", home / "l1"]
    result = loralens.behave(*paths, model=home / "llama", data=home / "d.jsonl", threads=1)
    words = ("--model", home / "llama", "--data", home / "d.jsonl")
    expected = plain(result)
    assert expected == told("behave", *paths, *words)
    assert expected == told("behave", *words, "--adapters", *paths)
    assert expected == told("behave", *words, "--adapters", paths[0], "--adapters", paths[1])
    assert [line.split(",")[0] for line in result.to_csv().splitlines()] == ["first", "base", "base", "l0"]
    model = models.llama(), models.tokenizer()
    again = loralens.behave([loralens.load(path) for path in paths], model=model, data=models.TEXTS, threads=1)
    assert [one.kl for one in again.contrasts] == [one.kl for one in result.contrasts]
    assert list(again.adapters) == ["adapter 1", "adapter 2"]
    assert not model[0].config.output_hidden_states
    assert Command("behave").run(*words).exit_code == 2


def test_behave_without_adapters_or_with_one_twice_is_refused(home: Path) -> None:
    how: dict[str, Any] = {"model": home / "llama", "data": ["it ran"], "threads": 1}
    with pytest.raises(OptionError, match="no adapter is given"):
        loralens.behave(**how)
    with pytest.raises(OptionError, match="an adapter is given twice"):
        loralens.behave(home / "l0", home / "l0", **how)


# --- train ---


def test_train_writes_what_the_command_writes(home: Path, tmp_path: Path) -> None:
    result = loralens.train(
        model=home / "llama", task="causal-lm", data=home / "d.jsonl", eval=home / "d.jsonl", output=tmp_path / "a",
        targets="q_proj,v_proj", **SHORT,
    )  # fmt: skip
    words = (
        "--model", home / "llama", "--task", "causal-lm", "--data", home / "d.jsonl", "--eval", home / "d.jsonl",
        "--targets", "q_proj", "--targets", "v_proj", "--rank", 2, "--batch", 4, "--steps", 2, "--lr", 0.05,
    )  # fmt: skip
    record = told("train", *words, "-o", tmp_path / "b")
    assert plain(result) == {**record, "target": str(tmp_path / "a")}
    for file in ("adapter_model.safetensors", "adapter_config.json", "run.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert isinstance(result.adapter, loralens.Adapter)
    assert loralens.equal(result.adapter, tmp_path / "a")
    assert [line.split(",")[0] for line in result.to_csv().splitlines()] == ["step", "0", "2"]
    assert result.loss == record["loss"]


def test_a_model_object_is_trained_and_left_as_it_was(home: Path, tmp_path: Path) -> None:
    model = models.bert("BertForSequenceClassification", num_labels=2, id2label={0: "x", 1: "y"})
    before, trainable = state(model), [parameter.requires_grad for parameter in model.parameters()]
    from_object = loralens.train(
        model=(model, models.tokenizer()), task="classification", data=PAIRS, output=tmp_path / "a", **SHORT
    )
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    from_folder = loralens.train(
        model=home / "bert", task="classification", data=home / "d.jsonl", output=tmp_path / "b", **SHORT
    )
    assert loralens.equal(from_object.adapter, from_folder.adapter, tolerance=0)
    heads = [next(iter(result.adapter.extra.values())).tensor.read() for result in (from_object, from_folder)]
    np.testing.assert_array_equal(*heads)
    assert from_object.adapter.base_model == "BertForSequenceClassification"


def test_a_plan_writes_nothing_and_needs_no_output(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = loralens.train(model=home / "llama", task="causal-lm", data=models.TEXTS, dry_run=True, **SHORT)
    assert (plan.run["steps"], plan.run["rank"], plan.parts.ranks, plan.output) == (2, 2, (2,), None)
    assert plan.conclusion()[0].startswith("Would train ")
    assert plan.record()["target"] is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": None}, "Missing option '--output'\n  fix: say where to write the adapter"),
        ({"model": None}, "Missing option '--model'\n  fix: give --model, or --demo"),
        ({"task": "causal"}, "task 'causal' is not possible"),
        ({"method": "lora-plus"}, "method 'lora-plus' is not possible\n  fix: choose one of lora, rslora, lora+"),
        ({"schedule": "step"}, "schedule 'step' is not possible"),
        ({"optimiser": "adam"}, "optimiser 'adam' is not possible"),
        ({"rank": 0}, "rank 0 is not possible"),
        ({"epochs": 1.0}, "--steps and --epochs exclude each other"),
        ({"watch": 0}, "watch 0 is not possible"),
    ],
)
def test_wrong_values_of_train_are_one_message_and_leave_nothing(
    home: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    given = {"model": home / "llama", "task": "causal-lm", "data": models.TEXTS, "output": tmp_path / "a"} | SHORT
    with pytest.raises(OptionError) as raised:
        loralens.train(**(given | options))
    assert message in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_how_a_run_goes_is_said_as_notes(home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="loralens"):
        loralens.train(model=home / "llama", task="causal-lm", data=models.TEXTS, output=tmp_path / "a", **SHORT)
    assert [record.getMessage().split()[:2] for record in caplog.records] == [["step", "1/2"], ["step", "2/2"]]
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_an_object_that_was_trained_goes_on_only_with_the_same_numbers(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loralens.formats.records.training import Training

    def train(model: Any, **more: Any) -> Any:
        pair, texts = (model, models.tokenizer()), list(models.TEXTS)
        given = SHORT | {"task": "causal-lm", "data": texts, "output": tmp_path / "a", "save_every": 1, "steps": 3}
        return loralens.train(model=pair, **(given | more))

    save = Training.save

    def stop(self: Training, saved: Any) -> None:
        save(self, saved)
        if saved.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        train(models.llama())
    monkeypatch.setattr(Training, "save", save)
    changed = models.llama()
    changed.lm_head.weight.data[0, 0] += 1
    with pytest.raises(loralens.MismatchError, match="holds another run: base is "):
        train(changed, resume=True)
    result = train(models.llama(), resume=True)
    whole = train(models.llama(), output=tmp_path / "b")
    assert loralens.equal(result.adapter, whole.adapter, tolerance=0)


# --- tables for other programs ---


@pytest.mark.some(4)
@pytest.mark.parametrize(
    "verb", ["train", "train with evaluation", "evaluate", "evaluate alone", "behave", "calibrate"]
)
def test_every_result_of_a_run_is_a_table_for_other_programs(verb: str, home: Path, tmp_path: Path) -> None:
    on: dict[str, Any] = {"model": home / "llama", "data": home / "d.jsonl", "threads": 1}
    task: dict[str, Any] = {**on, "task": "causal-lm"}
    training = {**task, **SHORT, "output": tmp_path / "run"}
    result: Any = {
        "train": lambda: loralens.train(**training),
        "train with evaluation": lambda: loralens.train(**training, eval=home / "d.jsonl"),
        "evaluate": lambda: loralens.evaluate(home / "l0", home / "l1", **task),
        "evaluate alone": lambda: loralens.evaluate(**task),
        "behave": lambda: loralens.behave(home / "l0", home / "l1", **on),
        "calibrate": lambda: loralens.calibrate(home / "l0", **on),
    }[verb]()
    heading, *rows = csv.reader(StringIO(result.to_csv()))
    assert rows
    assert all(len(row) == len(heading) for row in rows)
    assert result.to_latex().count(r"\begin{tabular}") >= 1
    assert "<table" in result._repr_html_()
    assert pickle.loads(pickle.dumps(result)).to_csv() == result.to_csv()
    pandas = pytest.importorskip("pandas")
    frame = result.to_frame()
    assert (list(frame.columns), len(frame)) == (heading, len(rows))
    # Numbers are numbers, also where all of them are absent.
    texts = {"path", "first", "second", "name", "hidden"}
    assert all(pandas.api.types.is_numeric_dtype(frame[name]) for name in heading if name not in texts)


def test_without_an_evaluation_the_table_of_a_training_has_its_losses(home: Path, tmp_path: Path) -> None:
    result = loralens.train(
        model=home / "llama", data=home / "d.jsonl", task="causal-lm", output=tmp_path / "run", **SHORT
    )
    heading, *rows = csv.reader(StringIO(result.to_csv()))
    assert heading == ["step", "loss"]
    assert [(int(step), float(loss)) for step, loss in rows] == list(result.losses.items())
