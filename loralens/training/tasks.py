"""Tasks on texts: their batches, their losses and their evaluation; one row each in `TASKS`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, nan
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loralens.core.names import row_named
from loralens.errors import OptionError
from loralens.training.feed import move_batch
from loralens.training.watch import Measures

Batch = dict[str, Tensor]
Order = Callable[[int], Sequence[int]]  # batch number → the examples in it
Draws = Callable[[int], np.random.Generator]  # row of a batch → what is drawn for it
# The value that cross_entropy of torch and the models of transformers ignore by default.
IGNORED = -100  # the label of a position that nothing is learned from
# BERT's shares (Devlin et al. 2018, §3.1): 15 % are asked for, and 80/10/10 % of these shown as mask, random token,
# themselves.
MASKED = 0.15  # part of the tokens that masked language modelling asks for
REPLACED, RANDOM = 0.8, 0.1  # of those, shown as the mask, and as any token; the rest is shown as it is


@final
@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Texts as numbers of tokens.

    Attributes
    ----------
    pad : int
        The token that fills up short texts.
    mask : int, optional
        For masked language modelling: the token that stands for a hidden one.
    vocabulary : int
        How many tokens there are.
    special : frozenset of int
        Tokens that are never hidden.
    """

    tokens: Sequence[list[int]]
    pad: int
    labels: Sequence[int] | None = None
    mask: int | None = None
    vocabulary: int = 0
    special: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, chosen: Sequence[int]) -> Batch:
        """Some examples, padded on the right to the longest: ids and mask (batch, length), labels (batch,) if any."""
        part = [self.tokens[i] for i in chosen]
        ids = torch.full((len(part), max(map(len, part))), self.pad)
        attention = torch.zeros_like(ids)
        for row, tokens in enumerate(part):
            ids[row, : len(tokens)], attention[row, : len(tokens)] = torch.tensor(tokens), 1
        batch = {"input_ids": ids, "attention_mask": attention}
        return batch if self.labels is None else batch | {"labels": torch.tensor([self.labels[i] for i in chosen])}


def encode_texts(tokenizer: Any, texts: Sequence[str], *, length: int, labels: Sequence[int] | None = None) -> Examples:
    """Texts through a transformers tokenizer, cut to ``length`` tokens.

    Raises
    ------
    OptionError
        A text has no tokens.
    """
    tokens = tokenizer(list(texts), truncation=True, max_length=length, padding=False)["input_ids"]
    for number, row in enumerate(tokens, start=1):
        if not row:
            raise OptionError(f"text {number} has no tokens: {texts[number - 1][:40]!r}", fix="take it out")
    return Examples(
        tokens,
        tokenizer.pad_token_id,
        labels,
        mask=tokenizer.mask_token_id,
        vocabulary=len(tokenizer),
        special=frozenset(tokenizer.all_special_ids),
    )


@final
@dataclass(frozen=True, slots=True)
class Task:
    """What a model is trained for.

    Attributes
    ----------
    head : str
        The class of transformers that loads a model for it.
    task_type : str or None
        What PEFT calls it.
    labelled : bool
        Whether every text needs a label.
    draw : callable
        From examples, chosen numbers of them and a generator for every row to a batch.
    predict : callable
        From model and batch to logits (n, classes) and what was asked for (n,).
    """

    name: str
    text: str
    head: str
    task_type: str | None
    labelled: bool
    draw: Callable[[Examples, Sequence[int], Draws], Batch]
    predict: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Σ −ln p of what was asked for, and how many were: for `loralens.training.fit`."""
        logits, labels = self.predict(model, batch)
        return cross_entropy(_in_float32(logits), labels, reduction="sum"), len(labels)

    def predicts_any(self, examples: Examples) -> bool:
        """Whether there is anything to ask for in any of the examples: a token that may be hidden, where some are."""
        if self.draw is not _draw_masked_batch:
            return True
        return any(not examples.special.issuperset(tokens) for tokens in examples.tokens)

    def batches(self, examples: Examples, order: Order, *, seed: int) -> Callable[[int], Batch]:
        """Batch number → batch, for `loralens.training.fit`.

        What is drawn for a text depends on the seed and on its place in the order alone, not on how that is cut into
        batches; all batches have as many texts as this one.
        """

        def batch(number: int) -> Batch:
            chosen = order(number)
            return self.draw(examples, chosen, _generators(seed, number * len(chosen)))

        return batch

    def evaluation(
        self, examples: Examples, *, size: int, seed: int = 0, step: Callable[[int], None] | None = None
    ) -> Callable[[nn.Module], Measures]:
        """From a model to ``loss``, ``accuracy`` and, of language, ``perplexity`` over all examples.

        All of them are NaN where nothing is asked: no text has a second token, or none of their tokens was hidden.
        ``step`` is told how many examples the model has seen, ``size`` at a time.
        """

        def evaluate(model: nn.Module) -> Measures:
            device, sums, count = next(model.parameters()).device, np.zeros(2), 0
            for start in range(0, len(examples), size):
                chosen = range(start, min(start + size, len(examples)))
                batch = move_batch(self.draw(examples, chosen, _generators(seed, start)), device)
                logits, labels = self.predict(model, batch)
                logits = _in_float32(logits)
                right = (logits.argmax(-1) == labels).sum()
                sums += float(cross_entropy(logits, labels, reduction="sum")), float(right)
                count += len(labels)
                if step:
                    step(len(chosen))
            # NaN instead of 0/0 where no token was asked for.
            loss, accuracy = (sums / count).tolist() if count else (nan, nan)
            measures = {"loss": loss, "accuracy": accuracy}
            return measures if self.labelled else measures | {"perplexity": exp(min(loss, 700.0))}

        return evaluate


def _draw_batch(examples: Examples, chosen: Sequence[int], draws: Draws) -> Batch:
    del draws
    return examples.batch(chosen)


def _draw_masked_batch(examples: Examples, chosen: Sequence[int], draws: Draws) -> Batch:
    """Hide tokens: labels hold what was there, `IGNORED` elsewhere (Devlin et al. 2018, §3.1)."""
    if examples.mask is None:
        raise OptionError(
            "the tokenizer has no token that stands for a hidden one",
            fix="set mask_token in its tokenizer_config.json, or choose another task",
        )
    batch = examples.batch(chosen)
    ids, labels = batch["input_ids"].numpy(), np.full(batch["input_ids"].shape, IGNORED)
    for row, number in enumerate(chosen):
        tokens, generator = np.asarray(examples.tokens[number]), draws(row)
        whether, how = generator.random((2, len(tokens)))
        other = generator.integers(0, max(examples.vocabulary, 1), len(tokens))
        hidden = (whether < MASKED) & ~np.isin(tokens, list(examples.special))
        shown = np.where(how < REPLACED, examples.mask, np.where(how < REPLACED + RANDOM, other, tokens))
        ids[row, : len(tokens)] = np.where(hidden, shown, tokens)
        labels[row, : len(tokens)] = np.where(hidden, tokens, IGNORED)
    return batch | {"labels": torch.from_numpy(labels)}


def _in_float32(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 as they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _without_labels(batch: Batch) -> Batch:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _classify(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return model(**_without_labels(batch)).logits, batch["labels"]


def _predict_next_tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and tokens of every position that is no padding, but the first."""
    is_predicted = batch["attention_mask"][:, 1:].bool()
    logits = model(**_without_labels(batch), use_cache=False).logits[:, :-1]
    return logits[is_predicted], batch["input_ids"][:, 1:][is_predicted]


def _predict_hidden_tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    is_hidden = batch["labels"] != IGNORED
    return model(**_without_labels(batch)).logits[is_hidden], batch["labels"][is_hidden]


def _generators(seed: int, first: int) -> Draws:
    """For every row a generator of its own, by its place in the whole order."""
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
        task_type=None,
        labelled=False,
        draw=_draw_masked_batch,
        predict=_predict_hidden_tokens,
    ),
)


def task_named(name: str) -> Task:
    """The row of that name.

    Raises
    ------
    OptionError
        There is none.
    """
    return row_named(name, TASKS, "task")
