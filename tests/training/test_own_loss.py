"""The default loss: a step that is cut into batches is the step of the whole, whatever the labels leave out."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from loralens.training import Course, Fitted, fit, inject
from tests import models

torch = pytest.importorskip("torch")
nn = torch.nn

TEXTS, LENGTH, IGNORED = 8, 12, -100
Batch = Mapping[str, Any]
# By the kind of the model: never the head, which may have fewer outputs than the rank.
TARGETS = {"llama": "*_proj", "gpt2": "c_attn", "t5": ["q", "v"], "bert": ["query", "value"]}
FLOAT32 = 3e-7  # the models of transformers compute the loss of a language model in float32, whatever their weights are


def numbers(seed: int) -> Any:
    return torch.Generator().manual_seed(seed)


def tokens() -> Any:
    return torch.randint(3, 24, (TEXTS, LENGTH), generator=numbers(0))


def masked_labels(ids: Any) -> Any:
    """Labels of which 0, 1, 2, 4, 11, 12, 3 and 1 count: no two parts of a step weigh alike, and one has none."""
    labels = torch.full_like(ids, IGNORED)
    for row, count in enumerate((0, 1, 2, 4, 11, 12, 3, 1)):
        labels[row, LENGTH - count :] = ids[row, LENGTH - count :]
    return labels


def language() -> Batch:
    ids = tokens()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": masked_labels(ids)}


def first_token_alone() -> Batch:
    """Labels of which one part of the step has the first token of each text alone, which nothing predicts."""
    batch = dict(language())
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:2] = IGNORED
    batch["labels"][:2, 0] = 5
    return batch


def classified(*, ignored: tuple[int, ...] = (0, 1, 5)) -> Batch:
    labels = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1])
    labels[list(ignored)] = IGNORED
    return {"input_ids": tokens(), "labels": labels}


def shifted() -> Batch:
    """Labels that the batch has already moved by one place, as collators without padding make them."""
    ids = tokens()
    labels = masked_labels(ids)
    return {"input_ids": ids, "labels": labels, "shift_labels": labels.roll(3, dims=1)}


def measured() -> Batch:
    return {"input_ids": tokens(), "labels": torch.randn(TEXTS, generator=numbers(2), dtype=torch.float64)}


# Name → the model, all texts of a step, and the sizes of parts that are tried.
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Batch]]] = {
    "causal": (models.llama, language),
    "causal, first tokens": (models.llama, first_token_alone),
    "causal, shifted before": (models.llama, shifted),
    "gpt2": (models.gpt2, language),
    "t5": (models.t5, language),
    "masked": (lambda: models.bert("BertForMaskedLM"), language),
    "classification": (lambda: models.bert("BertForSequenceClassification", num_labels=3), classified),
    "regression": (lambda: models.bert("BertForSequenceClassification", num_labels=1), measured),
    "tokens": (lambda: models.bert("BertForTokenClassification", num_labels=24), language),
}


def parts_of(batch: Batch, sizes: list[int]) -> list[Batch]:
    assert sum(sizes) == TEXTS
    starts = np.cumsum([0, *sizes])
    return [{name: t[a:b] for name, t in batch.items()} for a, b in pairwise(starts)]


def trained(model: Any, parts: list[Batch], **more: Any) -> Fitted:
    """One step of SGD in float64, in which all parts come once."""
    course = Course(1, lr=0.5, optimiser="sgd", warmup=0, clip=0, accumulate=len(parts))
    return fit(model.double(), parts, course=course, targets=TARGETS[model.config.model_type], rank=2, **more)


def same(one: Fitted, other: Fitted) -> None:
    assert one.losses[0] == pytest.approx(other.losses[0], rel=FLOAT32)
    moved = 0.0
    for name, module in one.adapter.items():
        np.testing.assert_allclose(module.B, other.adapter[name].B, rtol=1e-5, atol=1e-9, err_msg=name)
        moved = max(moved, float(np.abs(module.B).max()))
    assert moved > 1e-5


@pytest.mark.some(4)
@pytest.mark.parametrize("sizes", [[1] * 8, [2] * 4, [1, 5, 2]], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_step_cut_into_parts_is_the_step_of_the_whole(name: str, sizes: list[int]) -> None:
    make, texts = CASES[name]
    same(trained(make(), parts_of(texts(), sizes)), trained(make(), [texts()]))


@pytest.mark.some(6)
@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_a_whole_step_is_the_models_own(name: str) -> None:
    make, texts = CASES[name]
    with torch.no_grad():
        wanted = float(make().double()(**texts()).loss)
    assert trained(make(), [texts()]).losses[0] == pytest.approx(wanted, rel=FLOAT32)


@pytest.mark.slow
def test_accumulated_steps_are_those_of_the_trainer_of_transformers(tmp_path: Any) -> None:
    """PEFT's layers with our first factors, in transformers' own loop, over parts with very different labels."""
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    from tests.training.conftest import peft_beside

    rows = [{name: tensor[0] for name, tensor in part.items()} for part in parts_of(language(), [1] * 8)]
    feed = parts_of(language(), [2] * 4)
    ours = fit(
        models.llama(), feed, rank=4, targets="*_proj",
        course=Course(6, lr=1e-2, warmup=0, clip=0, accumulate=4),
    )  # fmt: skip
    theirs = peft_beside(inject(models.llama(), targets="*_proj", rank=4), models.llama())
    options = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0.0,
        per_device_train_batch_size=2, gradient_accumulation_steps=4, logging_steps=1, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = transformers.Trainer(theirs, options, train_dataset=rows)
    trainer.train()
    wanted = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose(ours.losses, wanted, rtol=1e-4)
