"""What adapters do to outputs: beside PEFT's own outputs and the formulas written out."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens import Adapter, LowRank
from loralens.analysis import measure_behaviour
from loralens.analysis.behaviour import BASE, sum_divergences
from loralens.core import Extra, LazyArray
from tests import models
from tests.draws import draw_adapter
from tests.marks import when_used

torch = pytest.importorskip("torch")
peft = when_used("peft")
nn = torch.nn

pytestmark = pytest.mark.usefixtures("quiet_torch")


def batches() -> list[dict[str, Any]]:
    """Padded on the right, of different sizes; the pads are real words, which must count nowhere."""
    made = []
    for seed, (rows, length) in enumerate(((3, 7), (2, 5))):
        ids = torch.randint(2, 24, (rows, length), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[0, 3:] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "output_hidden_states": True})
    return made


def outputs(model: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits and hidden states at the positions that count, one after another, float64."""
    logits, hidden = [], []
    with torch.no_grad():
        for batch in batches():
            out, mask = model(**batch), batch["attention_mask"].bool()
            logits.append(out.logits[mask].numpy())
            hidden.append([state[mask].numpy() for state in out.hidden_states])
    return np.concatenate(logits), [np.concatenate(layer) for layer in zip(*hidden, strict=True)]


def probabilities(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def in_peft(path: Path, kinds: list[str], seed: int) -> tuple[Any, Adapter]:
    model = peft.get_peft_model(
        models.llama(), peft.LoraConfig(target_modules=kinds, r=3, lora_alpha=6, modules_to_save=["lm_head"])
    )
    models.shake(model, 0.25, seed).save_pretrained(path)
    return model.double().eval(), loralens.load(path)


def test_the_numbers_are_those_of_peft_models(tmp_path: Path) -> None:
    made = {
        name: in_peft(tmp_path / name, kinds, i)
        for i, (name, kinds) in enumerate({"one": ["q_proj"], "two": ["v_proj", "up_proj"]}.items())
    }
    base = models.llama().double()
    before = copy.deepcopy(base.state_dict())
    found = measure_behaviour(base, batches(), adapters={name: adapter for name, (_, adapter) in made.items()})
    assert [(c.first, c.second) for c in found.contrasts] == [(BASE, "one"), (BASE, "two"), ("one", "two")]
    out = {BASE: outputs(base)} | {name: outputs(model) for name, (model, _) in made.items()}
    for contrast in found.contrasts:
        (l1, h1), (l2, h2) = out[contrast.first], out[contrast.second]
        p, q = probabilities(l1), probabilities(l2)
        assert contrast.kl == pytest.approx(np.mean(np.sum(p * np.log(p / q), axis=1)), rel=1e-9)
        assert contrast.kl > 1e-3
        apart = (l1 - l1.mean(1, keepdims=True)) - (l2 - l2.mean(1, keepdims=True))
        assert contrast.logits == pytest.approx(np.sqrt(np.mean(apart**2)), rel=1e-9)
        assert contrast.agreement == np.mean(l1.argmax(1) == l2.argmax(1)) < 1
        expected = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(h1, h2, strict=True)]
        assert contrast.hidden == pytest.approx(expected, rel=1e-9, abs=1e-14)
        assert contrast.hidden[0] == 0 < contrast.hidden[-1]
    assert found.positions == found.states == 3 + 7 + 7 + 3 + 5
    assert dict(found.left_out) == {"one": {}, "two": {}}
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_a_classifier_answers_once_a_text() -> None:
    model = models.bert("BertForSequenceClassification", num_labels=3).double()
    head = Extra("saved", "classifier", LazyArray.of(-model.classifier.weight.detach().numpy()))
    adapter = models.adapter(model, ("query",)).map(lambda m: LowRank(0 * m.B, m.A))
    adapter = Adapter(modules=adapter.modules, extra={"base_model.model.classifier.weight": head})
    plain = [{**batch, "output_hidden_states": False} for batch in batches()]
    found = measure_behaviour(model, plain, adapters={"a": adapter})
    assert (found.positions, found.states) == (5, 5)
    (contrast,) = found.contrasts
    assert contrast.hidden == ()
    with torch.no_grad():
        l1 = np.concatenate([model(**batch).logits.numpy() for batch in plain])
    l2 = -l1 + 2 * model.classifier.bias.detach().numpy()
    assert contrast.agreement == np.mean(l1.argmax(1) == l2.argmax(1))
    p, q = probabilities(l1), probabilities(l2)
    assert contrast.kl == pytest.approx(np.mean(np.sum(p * np.log(p / q), axis=1)), rel=1e-9)


class Skips(nn.Module):
    """Plain torch: a layer that is never called, and attention whose projections are no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Any) -> Any:
        return self.attn(*[self.fc(x)] * 3)[0]


def test_what_was_not_applied_not_called_or_rounded_is_named() -> None:
    shapes = {"fc": (4, 4), "idle": (4, 4), "attn.in_proj_weight": (12, 4), "attn.out_proj": (4, 4)}
    extra = {
        "head.weight": Extra("saved", "head", LazyArray.of(np.ones((2, 2)))),
        "x": Extra("other", "fc", LazyArray.of(np.ones(2))),
    }
    found = measure_behaviour(
        Skips().double(),
        [torch.ones(2, 3, 4).double().cumsum(1)],
        adapters={"a": draw_adapter(0, shapes, 1, dtype="f8", extra=extra)},
    )
    assert set(found.left_out["a"]) == {"head.weight", "x"}
    assert found.idle["a"] == ("idle",)
    assert found.changed["a"] == ("attn.in_proj_weight", "attn.out_proj")
    assert (found.positions, found.states) == (0, 6)
    assert len(found.contrasts[0].hidden) == 1
    assert found.contrasts[0].hidden[0] > 0.01


def test_the_divergence_of_almost_equal_models_is_not_negative() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 500)).astype(np.float32)) * 3
    for seed in range(20):
        change = np.random.default_rng(seed).standard_normal((64, 500)).astype(np.float32) * 1e-5
        p, q = logits.log_softmax(-1), (logits + torch.from_numpy(change)).log_softmax(-1)
        # To second order the divergence is half of the variance of the change under p.
        probabilities = p.double().exp().numpy()
        mean = (probabilities * change).sum(1, keepdims=True)
        expected = (probabilities * (change - mean) ** 2).sum() / 2
        assert sum_divergences(p, q) == pytest.approx(expected, rel=0.05)
