"""Tasks: what a batch holds, what is asked for, and the measures, beside literal loops."""

from contextlib import nullcontext
from math import exp
from typing import Any

import numpy as np
import pytest

from loralens.training import Examples, task_named, tasks
from loralens.training.world import exact_sums, join_processes
from tests import models

torch = pytest.importorskip("torch")

TOKENS = [[3, 4, 5], [6, 7, 8, 9, 10], [11], [12, 13]]


def examples(**more: Any) -> Examples:
    return Examples(TOKENS, 0, **more)


def log_softmax(logits: Any) -> Any:
    logits = logits.detach().double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_a_causal_model_is_asked_for_every_token_but_the_first() -> None:
    model, task = models.llama(), task_named("causal-lm")
    with torch.no_grad():
        total, count = task.loss(model, task.draw(examples(), [0, 1, 2]))
        wanted = 0.0
        for tokens in TOKENS[:3]:
            logs = log_softmax(model(input_ids=torch.tensor([tokens])).logits[0])
            wanted -= sum(logs[i, token] for i, token in enumerate(tokens[1:]))
    assert count == 2 + 4 + 0
    assert float(total) == pytest.approx(wanted, rel=1e-5)


def test_a_classifier_is_asked_for_the_label() -> None:
    model, task = models.bert("BertForSequenceClassification", num_labels=3), task_named("classification")
    some = examples(labels=[2, 0, 1, 1])
    with torch.no_grad():
        total, count = task.loss(model, task.draw(some, [0, 1, 2, 3]))
        logs = [log_softmax(model(input_ids=torch.tensor([tokens])).logits[0]) for tokens in TOKENS]
    assert count == 4
    assert float(total) == pytest.approx(
        -sum(log[label] for log, label in zip(logs, [2, 0, 1, 1], strict=True)), rel=1e-5
    )


@pytest.mark.parametrize("size", [1, 3, 64])
def test_measures_are_those_of_a_literal_loop(size: int) -> None:
    model, task = models.bert("BertForSequenceClassification", num_labels=3), task_named("classification")
    some = examples(labels=[2, 0, 1, 1])
    with torch.no_grad():
        measures = task.evaluation(some, size=size)(model)
        logs = np.stack([log_softmax(model(input_ids=torch.tensor([tokens])).logits[0]) for tokens in TOKENS])
    wanted = np.array([2, 0, 1, 1])
    assert set(measures) == {"loss", "accuracy"}
    assert measures["loss"] == pytest.approx(-logs[np.arange(4), wanted].mean(), rel=1e-5)
    assert measures["accuracy"] == (logs.argmax(-1) == wanted).mean()


def test_measures_of_language_have_the_perplexity_and_weigh_tokens_alike() -> None:
    model, task = models.llama(), task_named("causal-lm")
    with torch.no_grad():
        one, all_ = (task.evaluation(examples(), size=size)(model) for size in (1, 4))
        total, count = task.loss(model, task.draw(examples(), range(4)))
    assert one == pytest.approx(all_, rel=1e-5)
    assert one["loss"] == pytest.approx(float(total) / int(count), rel=1e-5)
    assert one["perplexity"] == pytest.approx(exp(one["loss"]))


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_blocks_of_an_evaluation_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = models.llama(), task_named("causal-lm")
    with torch.no_grad():
        whole = task.evaluation(examples(), size=4)(model)
        monkeypatch.setattr(tasks, "BLOCK", block)
        assert task.evaluation(examples(), size=4)(model) == pytest.approx(whole, rel=1e-6)


def test_a_causal_batch_is_padded_on_the_right_and_needs_no_mask() -> None:
    model, task = models.llama(), task_named("causal-lm")
    asked: list[set[str]] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: asked.append(set(kwargs)), with_kwargs=True)
    task.loss(model, task.draw(examples(), [0, 1]))
    assert "attention_mask" not in asked[0]


def test_losses_are_summed_on_the_cpu_for_a_gpu_without_float64() -> None:
    sums = exact_sums(2, torch.device("mps"))
    assert (sums.device.type, sums.dtype) == ("cpu", torch.float64)


def test_one_process_computes_on_the_gpu_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: chosen.append(device) or nullcontext())
    with join_processes(torch.device("cuda", 1)) as world:
        assert world.size == 1
    assert chosen == [torch.device("cuda", 1)]
