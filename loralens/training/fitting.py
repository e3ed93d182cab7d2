"""The function `fit`: trains LoRA layers in a model, from injection to the adapter."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from loralens.core.adapter import Adapter
from loralens.core.training import State
from loralens.errors import OptionError
from loralens.training.course import Course
from loralens.training.feed import Batches, Feed
from loralens.training.initial import Initialisation
from loralens.training.injection import Injection, inject
from loralens.training.loop import Loop, Loss, own_loss
from loralens.training.readout import read_injection
from loralens.training.targets import ALL_LINEAR
from loralens.training.watch import Measures, Watch
from loralens.training.world import World
from loralens.version import __version__


@final
@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """What training made.

    Attributes
    ----------
    adapter : Adapter
        Relative to the model as it was; its record says how it was made, see `loralens.training.record_of`.
    injection : Injection
        The layers, still in the model: ``injection.remove()`` puts the model back.
    losses : tuple of float
        Of every step that this call took, the mean over the step's batches, before the update.
    evaluations : tuple
        (steps done, measures) of every evaluation.
    steps : int
        How many were done, those of an earlier call that this one went on from included.
    best_step : int or None
        The step that the adapter is of, where patience was given.
    """

    adapter: Adapter
    injection: Injection
    losses: tuple[float, ...]
    evaluations: tuple[tuple[int, Measures], ...]
    steps: int
    best_step: int | None


def fit(
    model: nn.Module,
    batches: Batches,
    *,
    course: Course | None = None,
    loss: Loss = own_loss,
    targets: str | Sequence[str] = ALL_LINEAR,
    rank: int = 8,
    alpha: float = 16.0,
    method: str = "lora",
    heads: str | Sequence[str] = (),
    dropout: float = 0.0,
    seed: int = 0,
    initialisation: Initialisation = "kaiming-uniform",
    watch: Watch | None = None,
    state: State | None = None,
    shard: bool = False,
    base_model: str | None = None,
    task_type: str | None = None,
    record: Mapping[str, Any] | None = None,
) -> Fitted:
    """Train LoRA layers in a model, where it is, and return the adapter.

    Parameters
    ----------
    model : nn.Module
        On its device, in its dtype; factors are float32.
    batches : sequence, iterable or callable
        Batch number 0, 1, 2 …, see `loralens.training.feed.Feed`. Of several processes each takes its own.
    course : Course, optional
        By default one round over a sequence of batches, with everything else as `Course` has it.
    loss : callable
        ``loss(model, batch)``: a scalar, the mean over the batch, or a sum and how many it is over. By default what a
        transformers model computes itself: ``model(**batch).loss``.
    targets, rank, alpha, method, heads, dropout, seed, initialisation
        As `loralens.training.inject` takes them. ``seed`` is dropout's too.
    watch : Watch, optional
        What is looked at and kept on the way.
    state : State, optional
        Go on from there. On one machine the result is that of a run in one go, bit for bit. The model, the batches and
        the loss have to be that run's; all else is compared.
    shard : bool
        Lay the model in shards over all processes (FSDP2).
    base_model, task_type : str, optional
        As `loralens.training.read_injection` takes them.
    record : mapping, optional
        More to be recorded with the adapter, as JSON holds it: what the data was.

    Returns
    -------
    Fitted

    Raises
    ------
    OptionError
        See `loralens.training.inject`; an empty feed; a loss that is no tensor; a record that JSON cannot hold.
    DivergenceError
        The loss or its gradient is not finite; nothing was updated with it. Snapshots and states that the watch was
        given before are good.
    MismatchError
        The state is of another run: of another method, rank, seed, course, of other modules …; what differs is named.

    Notes
    -----
    When it fails, the layers are taken out again. Processes that torch.distributed brought together train as one: DDP,
    or FSDP2 with ``shard``; equal seeds and equal batches in a step give the adapter of a single process, to rounding.
    """
    _check_options(loss=loss, course=course, watch=watch, state=state, record=record or {})
    feed = Feed(batches)
    course = course or _course_of_one_round(feed)
    world = World.current(shard=shard)
    injection = inject(
        model,
        targets=targets,
        rank=rank,
        alpha=alpha,
        method=method,
        heads=heads,
        dropout=dropout,
        seed=seed,
        initialisation=initialisation,
    )
    try:
        loop = Loop(injection, feed, course, loss=loss, world=world, watch=watch or Watch(), seed=seed)
        loop.run(state)
    except BaseException:
        if not shard:  # a model in shards stays as it is
            injection.remove()
        raise
    training_record = {
        **course.record,
        "steps_done": loop.done,
        "best_step": loop.best_step,
        "processes": world.size,
        "loralens": __version__,
        "torch": torch.__version__,
        **(record or {}),
    }
    return Fitted(
        adapter=read_injection(injection, base_model=base_model, task_type=task_type, training=training_record),
        injection=injection,
        losses=tuple(loop.losses),
        evaluations=tuple(loop.evaluations),
        steps=loop.done,
        best_step=loop.best_step,
    )


def _check_options(*, loss: Any, course: Any, watch: Any, state: Any, record: Mapping[str, Any]) -> None:
    """Refuse what could not be called or asked, and before training what could not be written down after it."""
    if not callable(loss):
        raise OptionError(f"loss {loss!r} is no function", fix="give loss=lambda model, batch: …")
    for name, value, kind in (("course", course, Course), ("watch", watch, Watch), ("state", state, State)):
        if value is not None and not isinstance(value, kind):
            raise OptionError(f"{name} {value!r} is no {kind.__name__}", fix=f"give {name}={kind.__name__}(…)")
    try:
        json.dumps(dict(record))
    except (TypeError, ValueError) as error:
        what = f"the record cannot be kept with the adapter: {error}"
        raise OptionError(what, fix="give texts, Python's own numbers, lists and mappings of these") from error


def _course_of_one_round(feed: Feed) -> Course:
    """The course that takes every batch once."""
    if not feed.length:
        raise OptionError("it is not said how long to train", fix="give course=Course(steps=…)")
    return Course(steps=feed.length)
