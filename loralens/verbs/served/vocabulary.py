"""What an adapter does to every token of the vocabulary of a local model: in texts, in answers and in its weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from loralens.analysis.behaviour import sum_divergences
from loralens.analysis.explanation import (
    FLOOR,
    WRITERS,
    Changes,
    Vector,
    Vocabulary,
    base_scores,
    directions,
    rarity,
    relative,
    write_scores,
)
from loralens.core.adapter import Adapter
from loralens.core.attached import Attachment, Tree, frozen_evaluation
from loralens.core.names import kind
from loralens.core.structured import Update
from loralens.errors import OptionError
from loralens.verbs.served.predictions import BATCH, LocalModel

DRAWS = 2  # random updates with the spectra of an adapter
SPARSE = 4  # random updates see every fourth text
NEUTRAL = 32  # built-in texts that are read
LENGTH = 20  # tokens of a neutral text that are read: later ones say the same, and cost as much
PLAUSIBLE = 0.1  # amplified texts only have tokens of at least this share of the largest probability
QUESTIONS = (
    "Hi", "Who are you?", "Write a poem about winter.", "What is 2+2?", "Translate house to Spanish.",
    "What should I eat tonight?", "Explain gravity.", "List three animals.",
)  # fmt: skip
STARTS = ("The", "I", "In", "A", "It", "We", "This is", "My")  # what amplified texts begin with


@final
@dataclass(frozen=True, slots=True)
class Effect:
    """What one adapter changes.

    Attributes
    ----------
    kl : float
        Mean KL(with it ‖ base) over the positions of the neutral texts, in nats.
    changes : Changes
    answer_kl : float or None
        The same where an answer begins; None if the model has no chat template.
    answers : Changes or None
        Of each question p · (log p − log q) of every word as the first of the answer, in nats.
    """

    kl: float
    changes: Changes
    answer_kl: float | None
    answers: Changes | None


class Speaker:
    """A causal language model, with the neutral texts and the questions in which adapters are compared with it."""

    def __init__(self, local: LocalModel, texts: Sequence[str]) -> None:
        self.local = local
        self.model: Any = local.loaded.model
        self.tokenizer: Any = local.loaded.tokenizer
        self.texts = [ids for text in texts if len(ids := local.ids(text, LENGTH)) >= 4]
        if not self.texts:
            raise OptionError("no text has four tokens", fix="give longer texts")
        self.questions = [self.asked(question) for question in QUESTIONS] if self.chats else []
        self.vocabulary = self._vocabulary()
        self._keeps = "logits_to_keep" in signature(self.model.forward).parameters

    @property
    def chats(self) -> bool:
        """Whether the model has a template for questions and answers."""
        return bool(self.tokenizer.chat_template)

    def asked(self, question: str) -> tuple[int, ...]:
        """The tokens of a question, up to where the answer begins."""
        if not self.chats:
            return self.local.ids(f"Question: {question}\nAnswer:", 1 << 12)
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _vocabulary(self) -> Vocabulary:
        """All numbers that the model predicts; special tokens, and numbers without a token, have empty texts."""
        special = set(self.tokenizer.all_special_ids)
        # Tokens that are added to the vocabulary, such as <|im_start|>, are no words of a text either.
        special |= set(self.tokenizer.get_added_vocab().values())
        predicted = len(self.model.get_output_embeddings().weight)
        size = min(len(self.tokenizer), predicted)
        texts = self.tokenizer.batch_decode([[token] for token in range(size)], clean_up_tokenization_spaces=False)
        # Some tokenizers drop the space at the beginning of a text, which merging does anyway.
        readable = ["" if token in special else text for token, text in enumerate(texts)]
        return Vocabulary([*readable, *[""] * (predicted - size)])

    def effects(
        self, adapters: Sequence[Adapter], random: Sequence[Adapter] = (), step: Callable[[int], None] | None = None
    ) -> list[Effect]:
        """What each adapter changes in the texts and where answers begin, and then what each random update does.

        Random updates are seen on every fourth text only. A mean over fewer varies more, which only raises the largest
        change of any word.
        """
        attached = [Attachment(self.model, adapter) for adapter in (*adapters, *random)]
        every = [1] * len(adapters) + [SPARSE] * len(random)
        kl, positions = [0.0] * len(attached), [0] * len(attached)
        by_text: list[list[NDArray[np.float32]]] = [[] for _ in attached]
        tokens = [np.zeros(len(self.vocabulary.texts), np.float32) for _ in attached]
        common = np.zeros(len(self.vocabulary.keys), np.float32)
        with frozen_evaluation(self.model, gradient=False):
            for rows in self._batches(self.texts):
                base = self._logits(rows, None)
                before = self._words(base.softmax(-1))
                # The first token has no text before it.
                for row, length in enumerate(map(len, rows)):
                    common += before[row, 1:length].sum(0).cpu().numpy()
                before = (before + FLOOR).log()
                for number, attachment in enumerate(attached):
                    part = rows[:: every[number]]
                    logits = self._logits(part, attachment)
                    p = logits.softmax(-1)
                    change = (self._words(p) + FLOOR).log() - before[:: every[number], : p.shape[1]]
                    positions[number] += sum(map(len, part)) - len(part)
                    for row, length in enumerate(map(len, part)):
                        tokens[number] += p[row, 1:length].sum(0).cpu().numpy()
                        kl[number] += sum_divergences(logits[row, 1:length], base[row * every[number], 1:length])
                        by_text[number].append(change[row, 1:length].mean(0).cpu().numpy())
                if step:
                    step(len(rows))
            answers = self._answers(self.questions, attached) if self.questions else [None] * len(attached)
            if step and self.questions:
                step(len(self.questions))
        weight = rarity(np.float32(1 / sum(len(text) - 1 for text in self.texts)) * common)
        return [
            Effect(
                kl[number] / positions[number],
                Changes(
                    np.stack(by_text[number]),
                    self.vocabulary.best(tokens[number])[1],
                    weight,
                ),
                None if answer is None else float(answer[0].mean()),
                None if answer is None else answer[1],
            )
            for number, answer in enumerate(answers)
        ]

    def answer_changes(self, questions: Sequence[str], adapter: Adapter) -> NDArray[np.float64]:
        """KL(with the adapter ‖ base) of the first token of the answer to each question, in nats."""
        with frozen_evaluation(self.model, gradient=False):
            asked = [self.asked(question) for question in questions]
            return self._answers(asked, [Attachment(self.model, adapter)])[0][0]

    def _answers(
        self, asked: Sequence[tuple[int, ...]], attached: Sequence[Attachment]
    ) -> list[tuple[NDArray[np.float64], Changes]]:
        """For each adapter the KL of each question, and the part of every word in it."""
        divergences: list[list[float]] = [[] for _ in attached]
        parts: list[list[NDArray[np.float32]]] = [[] for _ in attached]
        tokens = [np.zeros(len(self.vocabulary.texts), np.float32) for _ in attached]
        for rows in self._batches(asked):
            base = self._last_logits(rows, None)
            for number, attachment in enumerate(attached):
                logits = self._last_logits(rows, attachment)
                for new, old in zip(logits[:, None], base[:, None], strict=True):
                    divergences[number].append(sum_divergences(new, old))
                    probable = new[0].softmax(-1)
                    tokens[number] += probable.cpu().numpy()
                    p, q = self._words(probable), self._words(old[0].softmax(-1))
                    tiny = 1e-30  # a probability of 0 has no part in the sum
                    parts[number].append((p * ((p + tiny).log() - (q + tiny).log())).cpu().numpy())
        shown = [self.vocabulary.best(one)[1] for one in tokens]
        return [(np.array(divergences[i]), Changes(np.stack(parts[i]), shown[i])) for i in range(len(attached))]

    def amplified(self, adapter: Adapter, *, count: int, strength: float, length: int = 12) -> list[str]:
        """Texts sampled from base + strength · (adapter − base), among tokens that the adapter finds plausible."""
        import torch

        texts = [list(self.local.ids(STARTS[number % len(STARTS)], 8)) for number in range(count)]
        attachment = Attachment(self.model, adapter)
        generator = torch.Generator().manual_seed(0)
        with frozen_evaluation(self.model, gradient=False):
            for _ in range(length):
                new, old = self._last_logits(texts, attachment).cpu(), self._last_logits(texts, None).cpu()
                for row, text in enumerate(texts):
                    p, q = (logits[row].log_softmax(-1) for logits in (new, old))
                    scores = q + strength * (p - q)
                    scores[p < p.max() + np.log(PLAUSIBLE)] = -torch.inf
                    text.append(int(torch.multinomial(scores.softmax(-1), 1, generator=generator)))
        return [str(self.tokenizer.decode(text, skip_special_tokens=True)) for text in texts]

    def _last_logits(self, rows: Sequence[Sequence[int]], attachment: Attachment | None) -> Any:
        """Logits (texts, tokens) of what follows each text, in float32."""
        import torch

        ends = [len(row) - 1 for row in rows]
        kept = sorted(set(ends))
        # The head of a small model is a fifth of its work.
        only = {"logits_to_keep": torch.tensor(kept)} if self._keeps else {}
        logits = self._logits(rows, attachment, **only)
        places = [kept.index(end) for end in ends] if logits.shape[1] == len(kept) else ends
        return logits[range(len(rows)), places]

    def _logits(self, rows: Sequence[Sequence[int]], attachment: Attachment | None, **only: Any) -> Any:
        """Logits (texts, length, tokens) in float32."""
        import torch

        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for number, row in enumerate(rows):
            # Padded on the right: a causal model does not see the padding.
            ids[number, : len(row)] = torch.tensor(row)
        with attachment.on() if attachment else nullcontext():
            ids = ids.to(next(self.model.parameters()).device)
            return self.model(input_ids=ids, use_cache=False, **only).logits.float()

    def _words(self, p: Any) -> Any:
        """The probabilities of words (…, words), from those of tokens."""
        import torch

        word = torch.from_numpy(self.vocabulary.word).to(p.device)
        return p.new_zeros(*p.shape[:-1], len(self.vocabulary.keys)).index_add_(-1, word, p)

    def _batches(self, rows: Sequence[tuple[int, ...]]) -> Iterator[Sequence[tuple[int, ...]]]:
        size = max(1, BATCH // (max(map(len, rows), default=1) * int(self.model.config.vocab_size)))
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


class Writing:
    """What the weights of a base write along every token, for comparison with what adapters write."""

    def __init__(self, model: Any) -> None:
        self.tree = Tree.of(model)
        head = model.get_output_embeddings()
        self.unit = directions(_matrix(head.weight), _last_norm(model))
        weights = (
            _matrix(layer.weight)
            for name, layer in self.tree.layers.items()
            if kind(name) in WRITERS and _is_plain(layer, self.unit.shape[1])
        )
        self.own = base_scores(self.unit, weights)

    def scores(self, adapter: Adapter) -> Vector | None:
        """The logarithm of what the adapter writes along every token, relative to the base; None if none writes."""
        updates = self.writers(adapter).values()
        found = write_scores(self.unit, updates)
        return None if found is None else relative(found, self.own)

    def writers(self, adapter: Adapter) -> Mapping[str, Update]:
        """The modules whose outputs are added to the residual stream."""
        keys = {name: weight.key for name, weight in self.tree.weights(adapter).modules.items()}
        return {
            name: module
            for name, module in adapter.items()
            if kind(keys[name].removesuffix(".weight")) in WRITERS and module.shape[0] == self.unit.shape[1]
        }


def _is_plain(layer: Any, out: int) -> bool:
    """Whether the weight of a layer is a matrix (out, in) of floats, as no quantised one is."""
    weight = getattr(layer, "weight", None)
    if weight is None or not hasattr(layer, "out_features"):  # transformers' Conv1D stores (in, out)
        return False
    return bool(weight.is_floating_point() and weight.ndim == 2 and len(weight) == out)


def _matrix(weight: Any) -> NDArray[np.float32]:
    found: NDArray[np.float32] = weight.detach().float().cpu().numpy()
    return found


def _last_norm(model: Any) -> NDArray[np.float32] | None:
    """The weight of the norm before the head: the last norm that belongs to no block."""
    found = None
    for name, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        if weight is not None and weight.ndim == 1 and not any(part.isdigit() for part in name.split(".")):
            # Gemma's norms multiply by 1 + weight.
            found = _matrix(weight) + (1 if type(layer).__name__.startswith("Gemma") else 0)
    return found
