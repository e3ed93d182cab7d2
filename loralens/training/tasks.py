"""Tasks on texts: their batches, losses and evaluations; one row each in `TASKS`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, exp, nan
from typing import final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loralens.core.lazy import Array
from loralens.core.names import row_named
from loralens.training.feed import move_batch
from loralens.training.loop import Measures
from loralens.training.world import World, exact_sums

Batch = dict[str, Tensor]
Order = Callable[[int], Sequence[int]]  # batch number → the examples in it
# The label of a position that is not predicted, which cross_entropy of torch ignores by default.
IGNORED = -100
# exp(710) is above the largest float64, and a perplexity of 1e304 says as much as an infinite one.
LARGEST_LOSS = 700.0
# The most logits of an evaluation that are float32 at a time. More do not fit into the cache of a CPU.
BLOCK = 2**23


@final
@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Texts as lists of token numbers.

    Attributes
    ----------
    pad : int
        The token that fills up the shorter texts of a batch.
    learned : sequence of list of bool, optional
        For every token of every text whether a causal language model learns it; by default all are learned.
    """

    tokens: Sequence[list[int]]
    pad: int
    labels: Sequence[int] | None = None
    learned: Sequence[list[bool]] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, chosen: Sequence[int]) -> Batch:
        """``input_ids`` and ``attention_mask`` of the chosen examples, (batch, length), padded to the longest."""
        part = [self.tokens[i] for i in chosen]
        # Padding is on the right, so that the positions of a text do not depend on the other texts.
        ids = torch.full((len(part), max(map(len, part))), self.pad)
        attention = torch.zeros_like(ids)
        for row, tokens in enumerate(part):
            ids[row, : len(tokens)], attention[row, : len(tokens)] = torch.tensor(tokens), 1
        return {"input_ids": ids, "attention_mask": attention}


@final
@dataclass(frozen=True, slots=True)
class Task:
    """A task for which a model is trained.

    Attributes
    ----------
    head : str
        The class of transformers that loads a model for the task.
    task_type : str
        PEFT's name of the task.
    labelled : bool
        Whether every text has a label, which is predicted; otherwise every token is, from those before it.
    """

    name: str
    head: str
    task_type: str
    labelled: bool

    def draw(self, examples: Examples, chosen: Sequence[int]) -> Batch:
        """A batch, whose ``labels`` are what is predicted at every place of the logits, or `IGNORED`."""
        batch = examples.batch(chosen)
        if self.labelled:
            assert examples.labels is not None
            return batch | {"labels": torch.tensor([examples.labels[i] for i in chosen])}
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for row, i in enumerate(chosen):
            tokens = examples.tokens[i][1:]
            learned = examples.learned[i][1:] if examples.learned else [True] * len(tokens)
            labels[row, : len(tokens)] = torch.tensor(
                [token if mine else IGNORED for token, mine in zip(tokens, learned, strict=True)], dtype=labels.dtype
            )
        return batch | {"labels": labels}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum of −ln p over the targets, and their number, as `loralens.training.fit` expects them."""
        logits, labels = self.predict(model, batch)
        # A sum, so that every token of a step has the same weight, whatever batch it is in.
        return cross_entropy(_at_least_float32(logits), labels, reduction="sum"), (labels != IGNORED).sum()

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The logits (n, classes) of a batch, and what is predicted (n,)."""
        # With labels, transformers would compute a loss of its own: the mean over a batch.
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        if not self.labelled:
            # Nothing sees the padding on its right, and attention without a mask is faster. A cache is of no use.
            del inputs["attention_mask"]
            logits = model(**inputs, use_cache=False).logits
        else:
            logits = model(**inputs).logits
        return logits.flatten(0, -2), batch["labels"].flatten()

    def batches(self, examples: Examples, order: Order) -> Callable[[int], Batch]:
        """A function from the number of a batch to the batch, for `loralens.training.fit`."""

        def batch(number: int) -> Batch:
            return self.draw(examples, order(number))

        batch.made_apart = True  # type: ignore[attr-defined]  # see `loralens.training.feed.Feed`
        return batch

    def evaluation(
        self,
        examples: Examples,
        *,
        size: int,
        step: Callable[[int], None] | None = None,
        world: World | None = None,
    ) -> Callable[[nn.Module], Measures]:
        """A function from a model to ``loss``, ``accuracy`` and, for language models, ``perplexity`` over all examples.

        All are NaN if there is nothing to predict: no text has a second token. ``step`` is called with the number
        of examples after every batch of ``size``. The processes of a ``world`` share the batches, and each of them
        gets the measures over all.
        """
        world = world or World()

        def evaluate(model: nn.Module) -> Measures:
            device, sums = next(model.parameters()).device, np.zeros(3)
            batches = ceil(len(examples) / size)
            for turn in range(ceil(batches / world.size)):
                start = (turn * world.size + world.rank) * size
                chosen = range(start, min(start + size, len(examples)))
                # Where nothing is left for this process: if the model is sharded, all have to gather its shards.
                batch = self.draw(examples, chosen or [0])
                measured = self._measure(model, move_batch(batch, device))
                if chosen:
                    sums += measured
                    if step:
                        step(len(chosen))
            *summed, count = world.total(sums.tolist(), device)
            # NaN instead of 0/0 if there was no token to predict.
            loss, accuracy = (each / count for each in summed) if count else (nan, nan)
            measures = {"loss": loss, "accuracy": accuracy}
            return measures if self.labelled else measures | {"perplexity": exp(min(loss, LARGEST_LOSS))}

        return evaluate

    def _measure(self, model: nn.Module, batch: Batch) -> Array:
        """The sum of the losses of a batch, the number of its right predictions, and that of its targets."""
        logits, labels = self.predict(model, batch)
        sums = exact_sums(3, logits.device)
        # In blocks, so that there is one copy of the logits, in the dtype of the model.
        for part in range(0, len(logits), max(1, BLOCK // logits.shape[-1])):
            rows = slice(part, part + max(1, BLOCK // logits.shape[-1]))
            block, targets = _at_least_float32(logits[rows]), labels[rows]
            right = (block.argmax(-1) == targets).sum()
            for place, number in enumerate(
                (cross_entropy(block, targets, reduction="sum"), right, (targets != IGNORED).sum())
            ):
                sums[place] += number.to(sums.device)
        return np.array(sums.tolist())


def _at_least_float32(logits: Tensor) -> Tensor:
    """The logits in float32, or in float64 if they are: in 16 bits a log-softmax loses its small differences."""
    return logits if logits.dtype == torch.float64 else logits.float()


TASKS: tuple[Task, ...] = (
    Task("classification", head="AutoModelForSequenceClassification", task_type="SEQ_CLS", labelled=True),
    Task("causal-lm", head="AutoModelForCausalLM", task_type="CAUSAL_LM", labelled=False),
    # Its batches and its loss are TRL's.
    Task("dpo", head="AutoModelForCausalLM", task_type="CAUSAL_LM", labelled=False),
)


def task_named(name: str) -> Task:
    """The row of a name.

    Raises
    ------
    OptionError
        There is no such task.
    """
    return row_named(name, TASKS, "task")
