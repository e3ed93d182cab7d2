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
from loralens.training.world import World, exact_sums

Batch = dict[str, Tensor]
Order = Callable[[int], Sequence[int]]  # batch number → the examples in it
Draws = Callable[[int], np.random.Generator]  # row of a batch → the generator for its random numbers
# The label of a position that is not predicted, which cross_entropy of torch ignores by default.
IGNORED = -100
# The shares of BERT (Devlin et al. 2018, §3.1).
MASKED = 0.15  # of the tokens, which masked language modelling predicts
REPLACED, RANDOM = 0.8, 0.1  # of those, replaced by the mask and by a random token; the others are shown unchanged
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
    mask : int, optional
        The token that replaces a hidden one, for masked language modelling.
    vocabulary : int
        The number of different tokens.
    special : frozenset of int
        The tokens that are never hidden.
    learned : sequence of list of bool, optional
        For every token of every text whether a causal language model learns it; by default all are learned.
    """

    tokens: Sequence[list[int]]
    pad: int
    labels: Sequence[int] | None = None
    mask: int | None = None
    vocabulary: int = 0
    special: frozenset[int] = frozenset()
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
    task_type : str or None
        PEFT's name of the task.
    labelled : bool
        Whether every text needs a label.
    draw : callable
        Makes a batch from examples, the numbers of the chosen ones, and a random generator for every row. Its
        ``labels`` are what is predicted at every place of the logits, or `IGNORED`.
    """

    name: str
    text: str
    head: str
    task_type: str | None
    labelled: bool
    draw: Callable[[Examples, Sequence[int], Draws], Batch]

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum of −ln p over the targets, and their number, as `loralens.training.fit` expects them."""
        logits, labels = self.predict(model, batch)
        # A sum, so that every token of a step has the same weight, whatever batch it is in.
        return cross_entropy(_at_least_float32(logits), labels, reduction="sum"), (labels != IGNORED).sum()

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The logits (n, classes) of a batch, and what is predicted (n,)."""
        # With labels, transformers would compute a loss of its own: the mean over a batch.
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        if self.draw is _draw_next_tokens:
            # Nothing sees the padding on its right, and attention without a mask is faster. A cache is of no use.
            del inputs["attention_mask"]
            logits = model(**inputs, use_cache=False).logits
        else:
            logits = model(**inputs).logits
        return logits.flatten(0, -2), batch["labels"].flatten()

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

        batch.made_apart = True  # type: ignore[attr-defined]  # see `loralens.training.feed.Feed`
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
                # Where nothing is left for this process: if the model is sharded, all have to gather its shards.
                batch = self.draw(examples, chosen or [0], _generators(seed, start))
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


def _draw_labelled(examples: Examples, chosen: Sequence[int], draws: Draws) -> Batch:
    del draws
    assert examples.labels is not None
    return examples.batch(chosen) | {"labels": torch.tensor([examples.labels[i] for i in chosen])}


def _draw_next_tokens(examples: Examples, chosen: Sequence[int], draws: Draws) -> Batch:
    """A batch in which the label of a place is the next token, where it is learned."""
    del draws
    batch = examples.batch(chosen)
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for row, i in enumerate(chosen):
        tokens = examples.tokens[i][1:]
        learned = examples.learned[i][1:] if examples.learned else [True] * len(tokens)
        labels[row, : len(tokens)] = torch.tensor(
            [token if mine else IGNORED for token, mine in zip(tokens, learned, strict=True)], dtype=labels.dtype
        )
    return batch | {"labels": labels}


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
        draw=_draw_labelled,
    ),
    Task(
        "causal-lm",
        "every token from those before it",
        head="AutoModelForCausalLM",
        task_type="CAUSAL_LM",
        labelled=False,
        draw=_draw_next_tokens,
    ),
    Task(
        "masked-lm",
        "hidden tokens from those around them",
        head="AutoModelForMaskedLM",
        task_type=None,  # PEFT has no class for it
        labelled=False,
        draw=_draw_masked_batch,
    ),
    # Its batches and its loss are TRL's.
    Task(
        "dpo",
        "a chosen answer rather than a rejected one",
        head="AutoModelForCausalLM",
        task_type="CAUSAL_LM",
        labelled=False,
        draw=_draw_next_tokens,
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
