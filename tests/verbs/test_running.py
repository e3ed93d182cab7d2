"""``train``, ``evaluate`` and ``behave`` from Python: objects beside paths, and the JSON of the commands."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens import OptionError
from tests import models
from tests.cli.command import Command
from tests.verbs.shown import check_tables_fit, record_of

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
    return Command(verb, "--threads", "1").told(*words)


def state(model: Any) -> dict[str, Any]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


# --- evaluate ---


def test_evaluate_gives_the_json_of_the_command_for_paths_and_objects(home: Path) -> None:
    paths, how = [home / "l0", home / "l1"], {"task": "causal-lm", "data": home / "d.jsonl", "threads": 1}
    result = loralens.evaluate(*paths, model=home / "llama", **how)  # type: ignore[arg-type]
    words = ("--model", home / "llama", "--task", "causal-lm", "--data", home / "d.jsonl")
    assert record_of(result) == told("evaluate", *paths, *words)
    assert result[str(paths[0])] == result.evaluations[0].measures
    check_tables_fit(result)
    objects = [loralens.load(path) for path in paths]
    model = models.llama(), models.tokenizer()
    before = state(model[0])
    again = loralens.evaluate(objects, model=model, task="causal-lm", data=list(models.TEXTS), threads=1)
    assert [one.measures for one in again.evaluations] == [one.measures for one in result.evaluations]
    assert [one.path for one in again.evaluations] == [str(path) for path in paths]
    assert (again.model, again.data) == ("LlamaForCausalLM", "texts")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model[0].state_dict().items())
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


# --- behave ---


def test_behave_gives_the_json_of_the_command(home: Path) -> None:
    paths = [home / "l0", home / "l1"]
    result = loralens.behave(*paths, model=home / "llama", data=home / "d.jsonl", threads=1)
    words = ("--model", home / "llama", "--data", home / "d.jsonl")
    expected = record_of(result)
    check_tables_fit(result)
    assert expected == told("behave", *paths, *words)
    assert [line.split(",")[0] for line in result.to_csv().splitlines()] == ["first", "base", "base", "l0"]
    model = models.llama(), models.tokenizer()
    again = loralens.behave([loralens.load(path) for path in paths], model=model, data=models.TEXTS, threads=1)
    assert [one.kl for one in again.contrasts] == [one.kl for one in result.contrasts]
    assert list(again.adapters.values()) == [str(path) for path in paths]
    assert not model[0].config.output_hidden_states
    assert Command("behave").run(*words).exit_code == 2


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
    assert record_of(result) == {**record, "target": str(tmp_path / "a")}
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": None}, "missing option 'output='\n  fix: say where to write the adapter"),
        ({"model": None}, "missing option 'model='\n  fix: give model=, or demo=True"),
        ({"task": "causal"}, "task 'causal' is not possible"),
        ({"method": "lora-plus"}, "method 'lora-plus' is not possible\n  fix: choose one of lora, rslora, lora+"),
        ({"schedule": "step"}, "schedule 'step' is not possible"),
        ({"optimiser": "adam"}, "optimiser 'adam' is not possible"),
        ({"rank": 0}, "rank 0 is not possible"),
        ({"epochs": 1.0}, "steps= and epochs= exclude each other"),
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
