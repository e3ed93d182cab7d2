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
from loralens.errors import OptionError
from loralens.training.feed import move_batch
from loralens.training.loop import Measures
from loralens.training.losses.in_blocks import loss_in_blocks
from loralens.training.world import World

Batch = dict[str, Tensor]
Order = Callable[[int], Sequence[int]]  # batch number → the examples in it
Draws = Callable[[int], np.random.Generator]  # row of a batch → the generator for its random numbers
# The label of a position that is not predicted: cross_entropy of torch and the models of transformers ignore this value
# by default.
IGNORED = -100
# The shares of BERT (Devlin et al. 2018, §3.1).
MASKED = 0.15  # of the tokens, which masked language modelling predicts
REPLACED, RANDOM = 0.8, 0.1  # of those, replaced by the mask and by a random token; the others are shown unchanged
# exp(710) is above the largest float64, and a perplexity of 1e304 says as much as an infinite one.
LARGEST_LOSS = 700.0


@final
@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Texts as lists of token numbers.

    Attributes
    ----------
    pad : int
        The token that fills up the shorter texts of a batch.
    mask : int, optional
        The token that replaces a hidden one, for masked language modelling.
    vocabulary : int
        The number of different tokens.
    special : frozenset of int
        The tokens that are never hidden.
    learned : sequence of list of bool, optional
        For every token of every text whether a causal language model learns it; by default all are learned.
    positions : sequence of list of int, optional
        The positions of the tokens, if a row holds several texts: see `loralens.training.texts.packing`.
    members : sequence of list of int, optional
        The numbers of the texts in each row, if a row holds several.
    """

    tokens: Sequence[list[int]]
    pad: int
    labels: Sequence[int] | None = None
    mask: int | None = None
    vocabulary: int = 0
    special: frozenset[int] = frozenset()
    learned: Sequence[list[bool]] | None = None
    positions: Sequence[list[int]] | None = None
    members: Sequence[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, chosen: Sequence[int]) -> Batch:
        """The chosen examples, padded on the right to the longest.

        ``input_ids`` and ``attention_mask`` have the shape (batch, length), ``labels``, if there are any, (batch,).
        """
        part = [self.tokens[i] for i in chosen]
        # Padding is on the right, so that the positions of a text do not depend on the other texts.
        ids = torch.full((len(part), max(map(len, part))), self.pad)
        attention = torch.zeros_like(ids)
        for row, tokens in enumerate(part):
            ids[row, : len(tokens)], attention[row, : len(tokens)] = torch.tensor(tokens), 1
        batch = {"input_ids": ids, "attention_mask": attention}
        if self.positions is not None:
            # Padding is one more text, which sees none of the others.
            places = torch.arange(ids.shape[1]).repeat(len(part), 1)
            for row, i in enumerate(chosen):
                size = len(self.positions[i])
                places[row, :size], places[row, size:] = torch.tensor(self.positions[i]), places[row, size:] - size
            batch["position_ids"] = places
        if self.learned is not None:
            labels = torch.full_like(ids, IGNORED)
            for row, i in enumerate(chosen):
                learned = torch.tensor(self.learned[i])
                labels[row, : len(learned)][learned] = ids[row, : len(learned)][learned]
            return batch | {"labels": labels}
        return batch if self.labels is None else batch | {"labels": torch.tensor([self.labels[i] for i in chosen])}


@final
@dataclass(frozen=True, slots=True)
class Task:
    """A task for which a model is trained.

    Attributes
    ----------
    head : str
        The class of transformers that loads a model for the task.
    task_type : str or None
        PEFT's name of the task.
    labelled : bool
        Whether every text needs a label.
    draw : callable
        Makes a batch from examples, the numbers of the chosen ones, and a random generator for every row.
    predict : callable
        Takes a model and a batch, and returns logits (n, classes) and targets (n,).
    """

    name: str
    text: str
    head: str
    task_type: str | None
    labelled: bool
    draw: Callable[[Examples, Sequence[int], Draws], Batch]
    predict: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """The sum of −ln p over the targets, and their number, as `loralens.training.fit` expects them."""
        if self.predict is _predict_next_tokens:
            with loss_in_blocks(model, batch) as ending:
                # Of a model that adds something to the loss of the tokens, only that of the tokens is wanted.
                if ending is not None and ending.alone:
                    return _loss_of_next_tokens(model, batch)
        logits, labels = self.predict(model, batch)
        # A sum, so that every token of a step has the same weight, whatever batch it is in.
        return cross_entropy(_at_least_float32(logits), labels, reduction="sum"), len(labels)

    def predicts_any(self, examples: Examples) -> bool:
        """Whether any example has a token to predict; in masked language modelling one that may be hidden."""
        if self.draw is not _draw_masked_batch:
            return True
        return any(not examples.special.issuperset(tokens) for tokens in examples.tokens)

    def batches(self, examples: Examples, order: Order, *, seed: int) -> Callable[[int], Batch]:
        """A function from the number of a batch to the batch, for `loralens.training.fit`.

        The random numbers for a text depend only on the seed and on its place in the order, not on how the order is
        divided into batches. All batches must have the same number of texts.
        """

        def batch(number: int) -> Batch:
            chosen = order(number)
            return self.draw(examples, chosen, _generators(seed, number * len(chosen)))

        return batch

    def evaluation(
        self,
        examples: Examples,
        *,
        size: int,
        seed: int = 0,
        step: Callable[[int], None] | None = None,
        world: World | None = None,
    ) -> Callable[[nn.Module], Measures]:
        """A function from a model to ``loss``, ``accuracy`` and, for language models, ``perplexity`` over all examples.

        All are NaN if there is nothing to predict: no text has a second token, or no token was hidden. ``step`` is
        called with the number of examples after every batch of ``size``. The processes of a ``world`` share the
        batches, and each of them gets the measures over all.
        """
        world = world or World()

        def evaluate(model: nn.Module) -> Measures:
            device, sums = next(model.parameters()).device, np.zeros(3)
            batches = ceil(len(examples) / size)
            for turn in range(ceil(batches / world.size)):
                start = (turn * world.size + world.rank) * size
                chosen = range(start, min(start + size, len(examples)))
                if chosen:
                    batch = move_batch(self.draw(examples, chosen, _generators(seed, start)), device)
                    sums += self._measure(model, batch)
                    if step:
                        step(len(chosen))
                else:
                    # Nothing is left for this process, but if the model is sharded, all have to gather its shards.
                    self._measure(model, move_batch(self.draw(examples, [0], _generators(seed, 0)), device))
            *summed, count = world.total(sums.tolist(), device)
            # NaN instead of 0/0 if there was no token to predict.
            loss, accuracy = (each / count for each in summed) if count else (nan, nan)
            measures = {"loss": loss, "accuracy": accuracy}
            return measures if self.labelled else measures | {"perplexity": exp(min(loss, LARGEST_LOSS))}

        return evaluate

    def _measure(self, model: nn.Module, batch: Batch) -> Array:
        """The sum of the losses of a batch, the number of its right predictions, and that of its targets."""
        logits, labels = self.predict(model, batch)
        logits = _at_least_float32(logits)
        right = (logits.argmax(-1) == labels).sum()
        # As float64, in which they are summed.
        return np.array([float(cross_entropy(logits, labels, reduction="sum")), float(right), len(labels)])


def _draw_batch(examples: Examples, chosen: Sequence[int], draws: Draws) -> Batch:
    del draws
    return examples.batch(chosen)


def _draw_masked_batch(examples: Examples, chosen: Sequence[int], draws: Draws) -> Batch:
    """A batch with hidden tokens: the labels are the original tokens there, and `IGNORED` elsewhere."""
    if examples.mask is None:
        raise OptionError(
            "the tokenizer has no mask token, which replaces hidden tokens",
            fix="set mask_token in its tokenizer_config.json, or choose another task",
        )
    batch = examples.batch(chosen)
    # A NumPy view of the tensor, so that writing into it changes the batch.
    ids, labels = batch["input_ids"].numpy(), np.full(batch["input_ids"].shape, IGNORED)
    for row, number in enumerate(chosen):
        tokens, generator = np.asarray(examples.tokens[number]), draws(row)
        # All numbers are drawn for every token, so that they do not depend on which tokens are special.
        whether, how = generator.random((2, len(tokens)))
        # At least 1, since NumPy refuses an empty range; examples made by hand may leave the size out.
        other = generator.integers(0, max(examples.vocabulary, 1), len(tokens))
        hidden = (whether < MASKED) & ~np.isin(tokens, list(examples.special))
        shown = np.where(how < REPLACED, examples.mask, np.where(how < REPLACED + RANDOM, other, tokens))
        ids[row, : len(tokens)] = np.where(hidden, shown, tokens)
        labels[row, : len(tokens)] = np.where(hidden, tokens, IGNORED)
    return batch | {"labels": torch.from_numpy(labels)}


def _at_least_float32(logits: Tensor) -> Tensor:
    """The logits in float32, or in float64 if they are: in 16 bits a log-softmax loses its small differences."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _without_labels(batch: Batch) -> Batch:
    # With labels, transformers would compute a loss of its own: the mean over a batch. With a mask it would not look at
    # positions to see which texts are in a row.
    left_out = {"labels", "attention_mask"} if "position_ids" in batch else {"labels"}
    return {name: tensor for name, tensor in batch.items() if name not in left_out}


def _classify(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return model(**_without_labels(batch)).logits, batch["labels"]


def _predict_next_tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits and tokens of every position but the first, without padding and without what is not learned."""
    labels = batch.get("labels")
    is_predicted = batch["attention_mask"][:, 1:].bool() if labels is None else labels[:, 1:] != IGNORED
    # The logits at a position are those of the next token. A cache of keys and values would be of no use.
    logits = model(**_without_labels(batch), use_cache=False).logits[:, :-1]
    return logits[is_predicted], batch["input_ids"][:, 1:][is_predicted]


def _loss_of_next_tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """The sum of the losses of these tokens and their number, from the loss that the model computes itself."""
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    count = int((labels[:, 1:] != IGNORED).sum())
    return model(**_without_labels(batch), labels=labels, use_cache=False).loss * count, count


def _predict_hidden_tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    is_hidden = batch["labels"] != IGNORED
    return model(**_without_labels(batch)).logits[is_hidden], batch["labels"][is_hidden]


def _generators(seed: int, first: int) -> Draws:
    """A generator for every row of a batch, whose key is the place of the row in the whole order."""
    return lambda row: np.random.Generator(np.random.Philox(key=[seed % 2**64, first + row]))


TASKS: tuple[Task, ...] = (
    Task(
        "classification",
        "the label of a text",
        head="AutoModelForSequenceClassification",
        task_type="SEQ_CLS",
        labelled=True,
        draw=_draw_batch,
        predict=_classify,
    ),
    Task(
        "causal-lm",
        "every token from those before it",
        head="AutoModelForCausalLM",
        task_type="CAUSAL_LM",
        labelled=False,
        draw=_draw_batch,
        predict=_predict_next_tokens,
    ),
    Task(
        "masked-lm",
        "hidden tokens from those around them",
        head="AutoModelForMaskedLM",
        task_type=None,  # PEFT has no class for it
        labelled=False,
        draw=_draw_masked_batch,
        predict=_predict_hidden_tokens,
    ),
)


def task_named(name: str) -> Task:
    """The row of a name.

    Raises
    ------
    OptionError
        There is no such task.
    """
    return row_named(name, TASKS, "task")
