"""The loss that a model computes itself, as a sum over its terms and their number."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loralens.errors import OptionError
from loralens.training.tasks import IGNORED

# The kinds of loss of transformers that compare the logits of a position with the label of the next one. A model whose
# class has none of transformers' names for a loss gets the first.
SHIFTED = ("ForCausalLM", "ForConditionalGeneration", "CsmForConditionalGeneration", None)


def own_loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """The loss that a transformers model computes itself from a batch with labels, and the number of its terms.

    The model returns a mean. It is multiplied by the number of its terms, so that all terms of a step weigh the same,
    however the step is divided into batches: see `count_terms`.

    Raises
    ------
    OptionError
        The batch is not a mapping, or the model returns no loss.
    """
    if not isinstance(batch, Mapping):
        what = f"a batch is a {type(batch).__name__}, but a model computes its own loss only from a mapping"
        raise OptionError(what, fix="give mappings of names to tensors, with labels, or pass loss=")
    mean: Tensor | None = getattr(model(**batch), "loss", None)
    if mean is None:
        raise OptionError("the model returned no loss", fix="put labels into the batches, or pass loss=")
    number = count_terms(model, batch).to(mean.device)
    # A sum of 16 bits would be rounded, and one of float16 is infinite from some ten thousand labels on.
    mean = mean if mean.dtype == torch.float64 else mean.float()
    # A mean over nothing is NaN. It is replaced on the device, since asking for the number would wait for a GPU; the
    # graph stays, since every process must have gradients.
    return torch.where(number > 0, mean * number, torch.zeros_like(mean)), number


def count_terms(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The number of terms that a model's own loss is a mean over, as a tensor with one number.

    These are the labels that are not −100, without the first of every text where the model predicts the next token; all
    labels that are not whole numbers (of a regression, or of several classes at once); and the examples of a batch
    without labels, such as one of questions with the places of their answers.
    """
    labels = batch.get("shift_labels")
    if not isinstance(labels, Tensor):
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.ndim > 1 and _predicts_next(model):
            labels = labels[..., 1:]
    if not isinstance(labels, Tensor):
        sizes = [len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim]
        return torch.tensor(sizes[0] if sizes else 1)
    if labels.is_floating_point():
        return torch.tensor(labels.numel())
    return (labels != IGNORED).sum()


def _predicts_next(model: nn.Module) -> bool:
    """Whether a model compares the logits of a position with the label of the next one."""
    # DDP hides the attributes of the model that it wraps.
    inner: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    # The decoder of such a model gets the labels moved by one place already.
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return False
    # An attribute that every model of transformers has; the labels of another model are taken as they are.
    return getattr(inner, "loss_type", "") in SHIFTED
