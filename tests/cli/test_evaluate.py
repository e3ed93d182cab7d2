"""``loralens evaluate``: its numbers against a loop over single texts, and what it says and refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens import Adapter
from tests import models
from tests.cli.command import Command
from tests.tolerances import EVALUATED

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quiet_torch")

LABELS = ("x", "y", "y", "x")


EVALUATE = Command("evaluate", "--threads", "1")
run, good, refused = EVALUATE.run, EVALUATE.good, EVALUATE.refused


def rows(*args: object) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = EVALUATE.told(*args)["adapters"]
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    """Models of two tasks, texts, and adapters: two of language, and a classifier that was trained for a moment."""
    home = tmp_path_factory.mktemp("home")
    llama = models.llama()
    models.folder(llama, home / "llama")
    models.folder(models.bert(), home / "bert")
    named = models.bert("BertForSequenceClassification", num_labels=2, id2label={0: "y", 1: "x"})
    models.folder(named, home / "classifier")
    models.jsonl(home / "d.jsonl", label=LABELS)
    for seed in (0, 1):
        models.saved(models.adapter(llama, ("q_proj", "down_proj"), seed=seed), home / f"l{seed}")
    trained = ("--rank", 2, "--batch", 4, "--steps", 3, "--lr", 0.05, "--length", 5, "--threads", 1)
    files = ("--model", home / "bert", "--data", home / "d.jsonl", "--task", "classification", "-o", home / "c")
    Command().good("train", *files, *trained)
    return home


def of(home: Path, model: str) -> tuple[object, ...]:
    task = "causal-lm" if model == "llama" else "classification"
    return ("--model", home / model, "--task", task, "--data", home / "d.jsonl")


def changed(model: Any, adapter: Adapter) -> Any:
    """The model with ΔW added to its weights, and what was trained in full in its place."""
    state = {key: tensor.numpy().astype(np.float64) for key, tensor in model.state_dict().items()}
    for name, module in adapter.items():
        state[f"{name}.weight"] = state[f"{name}.weight"] + module.dense()
    for extra in adapter.extra.values():
        state[f"{extra.module}.{extra.parameter}"] = extra.tensor.read().astype(np.float64)
    model.load_state_dict({key: torch.from_numpy(array) for key, array in state.items()})
    return model.double().eval()


def judged(model: Any, wanted: list[int] | None, *, length: int = 256) -> dict[str, float]:
    """Every text by itself: the label's loss, or that of each token from those before it."""
    losses, right = [], []
    for number, text in enumerate(models.TEXTS):
        ids = torch.tensor([models.tokenizer()(text)["input_ids"][:length]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        asked = [(logits, wanted[number])] if wanted else list(zip(logits[:-1], ids[0, 1:].tolist(), strict=True))
        for row, answer in asked:
            losses.append(float(torch.logsumexp(row, 0) - row[answer]))
            right.append(int(row.argmax()) == answer)
    loss = float(np.mean(losses))
    found = {"loss": loss, "accuracy": float(np.mean(right))}
    return found if wanted else found | {"perplexity": float(np.exp(loss))}


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_language_is_measured_as_a_loop_over_texts_measures_it(home: Path, batch: int) -> None:
    found = rows(home / "l0", home / "l1", *of(home, "llama"), "--batch", batch)
    assert [row.pop("path") for row in found] == [str(home / "l0"), str(home / "l1")]
    assert [row.pop("parameters") for row in found] == [loralens.load(home / name).parameters for name in ("l0", "l1")]
    for row, seed in zip(found, (0, 1), strict=True):
        expected = judged(changed(models.llama(), loralens.load(home / f"l{seed}")), None)
        assert row == pytest.approx(expected, **EVALUATED)
    assert found[0]["loss"] != pytest.approx(found[1]["loss"], rel=1e-3)


def test_the_model_as_it_is(home: Path) -> None:
    (row,) = rows(*of(home, "llama"), "--length", 3)
    assert (row.pop("path"), row.pop("parameters")) == (None, None)
    assert row == pytest.approx(judged(models.llama().double(), None, length=3), **EVALUATED)
    assert "(the model as it is)" in good(*of(home, "llama")).stdout


def test_a_classifier_has_its_head_its_labels_and_its_length_from_the_adapter(home: Path) -> None:

    (row,) = rows(home / "c", *of(home, "bert"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(home / "bert", num_labels=2)
    expected = judged(changed(model, loralens.load(home / "c")), [0, 1, 1, 0], length=5)
    assert row["loss"] == pytest.approx(expected["loss"], **EVALUATED)
    assert row["accuracy"] == expected["accuracy"]
    (longer,) = rows(home / "c", *of(home, "bert"), "--length", 12)
    assert longer["loss"] != pytest.approx(row["loss"], rel=1e-4)


def test_a_classifier_that_knows_the_labels_is_asked_in_its_own_order(home: Path) -> None:
    (row,) = rows(*of(home, "classifier"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(home / "classifier").double()
    assert row["loss"] == pytest.approx(judged(model, [1, 0, 0, 1])["loss"], **EVALUATED)


def test_a_head_that_nobody_has_is_random_and_said_to_be(home: Path, tmp_path: Path) -> None:
    result = good(*of(home, "bert"))
    assert f"warning: {home / 'bert'}: the model does not have classifier.bias and 1 more: random here" in result.stderr
    Command().good("combine", home / "c", home / "c", "--take", "none", "-o", tmp_path / "headless")
    result = good(tmp_path / "headless", *of(home, "bert"))
    assert "neither the model nor the adapter has classifier.bias and 1 more: random here" in result.stderr
    assert "warning" not in good(home / "c", *of(home, "bert")).stderr


def test_a_file_of_the_result_is_shown_by_a_report(home: Path, tmp_path: Path) -> None:
    file, page = tmp_path / "e.json", tmp_path / "page.html"
    shown = good(home / "l0", home / "l1", *of(home, "llama"), "-o", file).stdout
    assert f"Wrote {file}." in shown
    stored = json.loads(file.read_text())
    assert stored["adapters"] == rows(home / "l0", home / "l1", *of(home, "llama"))
    made = loralens.report(home / "l0", home / "l1", evaluations=file, output=page)
    perplexity = stored["adapters"][0]["perplexity"]
    assert made.document.summary[0].startswith(f"On 4 texts of d.jsonl: perplexity {perplexity:.4g} with l0 (")
    refused(home / "l0", *of(home, "llama"), "-o", file)
    inside = home / "l0" / "adapter_model.safetensors"
    assert "lies within" in refused(home / "l0", *of(home, "llama"), "-o", inside, "--overwrite")
    assert loralens.load(home / "l0")
