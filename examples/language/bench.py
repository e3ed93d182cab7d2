"""A language model on which methods are compared: each trains a copy of it, and all are judged in the same way."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from math import isfinite
from os import PathLike
from time import perf_counter
from typing import Any

import torch
from language.bleu import bleu
from language.decoding import continuations
from language.recipe import Recipe
from language.texts import Pair, Pairs, records
from rivals.methods import method_named, trained
from rivals.training import learn
from torch import nn

import loralens
from loralens.core.attached import Attachment, frozen_evaluation
from loralens.errors import DivergenceError
from loralens.training import Course
from loralens.training.feed import shuffle_order
from loralens.training.tasks import Examples, task_named
from loralens.verbs.models.models import load_headed

TASK = task_named("causal-lm")
EVALUATED = 16  # texts in a batch of an evaluation
PARTS = ("validation", "held_out")


class Bench:
    """The model with its texts as tokens.

    Parameters
    ----------
    model : path, or name of a package
    pairs : Pairs
    recipe : Recipe
    device : str
    threads, jobs : int
        The number of threads of the CPU, and of LoRA runs at a time.
    only_done : bool
        Whether nothing is trained or judged that is not done already.
    """

    def __init__(
        self,
        model: str,
        pairs: Pairs,
        recipe: Recipe,
        *,
        device: str = "cpu",
        threads: int = 1,
        jobs: int = 1,
        only_done: bool = False,
    ) -> None:
        self.source, self.pairs, self.recipe = model, pairs, recipe
        self.device, self.threads, self.jobs, self.only_done = device, threads, jobs, only_done

    @cached_property
    def _loaded(self) -> Any:
        return load_headed(self.source, TASK.head, device=self.device, dtype="f32", threads=self.threads)

    @property
    def model(self) -> nn.Module:
        """The base, which no method changes."""
        return self._loaded.model

    @property
    def size(self) -> int:
        """The number of parameters of the base."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def tokenizer(self) -> Any:
        return self._loaded.tokenizer

    def tokens(self, pairs: Sequence[Pair]) -> Examples:
        """Prompts and completions, of which the completions are learned."""
        return self._loaded.encode(records(pairs), length=self.recipe.length)

    @cached_property
    def _learned(self) -> Examples:
        return self.tokens(self.pairs.train)

    def part(self, name: str) -> Sequence[Pair]:
        """The texts that a loss is measured on: those of ``validation`` or ``held_out``."""
        recipe, pairs = self.recipe, self.pairs
        return {"validation": pairs.validation[: recipe.validation], "held_out": pairs.held_out[: recipe.judged]}[name]

    @cached_property
    def _parts(self) -> dict[str, Examples]:
        return {name: self.tokens(part) for name in PARTS if (part := self.part(name))}

    @property
    def counts(self) -> dict[str, int]:
        """The number of texts of each part, and of the tokens whose loss is measured."""
        counts = {"train": len(self.pairs.train), "written": len(self._written)}
        for part, examples in self._parts.items():
            counts |= {part: len(examples), f"{part}_tokens": sum(sum(row[1:]) for row in examples.learned or ())}
        return counts

    def trained(
        self, method: str, *, lr: float, seed: int, steps: int | None = None, batch: int | None = None
    ) -> tuple[nn.Module, dict[str, Any]]:
        """A copy of the model, trained by a method of `rivals`, and the record of the run.

        Steps and batch are by default those of the recipe. A run whose loss is no longer finite ends there, and has
        no losses in its record.
        """
        begun, recipe = perf_counter(), self.recipe
        steps, batch = steps or recipe.steps, batch or recipe.batch
        course = Course(steps, lr=lr, schedule=recipe.schedule)  # type: ignore[arg-type]
        model = method_named(method).prepare(copy.deepcopy(self.model), seed)
        order = shuffle_order(len(self._learned), size=batch, seed=seed)
        record = {"method": method, "lr": lr, "seed": seed, "steps": steps, "batch": batch}
        record["trained"] = sum(parameter.numel() for parameter in trained(model).values())
        try:
            batches = TASK.batches(self._learned, order)
            record["losses"] = learn(model, batches, course, TASK)
        except DivergenceError:
            record["losses"] = None
        return model, record | {"seconds": round(perf_counter() - begun, 1)}

    def loss(self, model: nn.Module, part: str) -> float | None:
        """The loss per token of the completions of a part: ``validation`` or ``held_out``; None if it is not finite."""
        with frozen_evaluation(model, gradient=False):
            loss = TASK.evaluation(self._parts[part], size=EVALUATED)(model)["loss"]
        return loss if isfinite(loss) else None

    @property
    def _written(self) -> list[str]:
        prompts = dict.fromkeys(pair.prompt for pair in self.pairs.held_out)
        return list(prompts)[: self.recipe.written]

    def judged(self, model: nn.Module) -> dict[str, Any]:
        """The loss on the held-out texts, and BLEU of the sentences that the model writes for their prompts."""
        sentences = self.sentences(model)
        scores = bleu(sentences, [self.pairs.references[prompt] for prompt in self._written])
        return {"loss": self.loss(model, "held_out"), **scores, "sentences": sentences}

    def sentences(self, model: nn.Module) -> list[str]:
        """What the model writes for the prompts of held-out texts."""
        ends, tokenizer = self.tokenizer.eos_token_id, self.tokenizer
        prompts = [tokenizer(prompt, verbose=False)["input_ids"] for prompt in self._written]
        with frozen_evaluation(model, gradient=False):
            written = continuations(model, prompts, end=ends, pad=tokenizer.pad_token_id or 0, most=self.recipe.longest)
        return [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in written]

    @contextmanager
    def with_adapter(self, path: str | PathLike[str]) -> Iterator[nn.Module]:
        """The base with the adapter of a folder."""
        with torch.no_grad(), Attachment(self.model, loralens.load(path)).on():
            yield self.model
