"""The function `fit`: trains LoRA layers in a model, from injection and the first gradients to the adapter."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from loralens.core.adapter import Adapter
from loralens.core.stored import State
from loralens.errors import OptionError
from loralens.exports import takes_options
from loralens.training.course import Course
from loralens.training.feed import CPU, Batches, Feed, move_batch
from loralens.training.initialisation import weight_gradients
from loralens.training.injection import Injection, inject
from loralens.training.loop import Loop, Loss, Measures, Precision, Watch, loss_and_count
from loralens.training.own_loss import own_loss
from loralens.training.readout import start_from, start_with_a
from loralens.training.targets import LoraOptions
from loralens.training.world import World, recompute_blocks
from loralens.version import __version__


def first_gradients(
    weights: Mapping[str, Tensor],
    *,
    model: nn.Module,
    feed: Feed,
    course: Course,
    loss: Loss,
    world: World,
    device: torch.device,
) -> Mapping[str, Tensor]:
    """The gradients of weights, by the names of their layers, in the first step of a run.

    A run that is resumed computes the same gradients again: it has to subtract the pair with which it began.
    """
    if world.size > 1:
        raise OptionError("lora-ga takes the gradient of one process", fix="train in one process, or start kaiming")
    precision = Precision.of(model, device, autocast=course.autocast)
    # The caller's random numbers stay as they are, whatever the model draws.
    generators = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    recomputing = recompute_blocks(model, on=course.checkpointing)
    with generators, recomputing, torch.enable_grad(), weight_gradients(model, weights) as gradients:
        for batch in feed.first(course.accumulate):
            with precision.context():
                result = loss(model, move_batch(batch, device))
            summed, over = loss_and_count(result)
            if not precision.scale:
                precision.begin(float(over))
            # Only the directions count, so that neither the scale nor the number of terms is divided out.
            (summed * precision.scale).backward()  # type: ignore[no-untyped-call]
    return gradients


@final
@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """The result of training.

    Attributes
    ----------
    adapter : Adapter
        The adapter relative to the original model. `loralens.training.record_of` gives the record of its training.
    injection : Injection
        The layers, which are still in the model: ``injection.remove()`` restores it.
    losses : tuple of float
        The loss of every step of this call before the update: the mean over its terms, or over its batches if the loss
        function returns means.
    evaluations : tuple
        (steps done, measures) of every evaluation.
    steps : int
        The number of steps done, including those of an earlier call from whose state this one started.
    best_step : int or None
        The step whose adapter this is, if patience was given.
    stopped : bool
        Whether the watch has stopped the run before its end.
    """

    adapter: Adapter
    injection: Injection
    losses: tuple[float, ...]
    evaluations: tuple[tuple[int, Measures], ...]
    steps: int
    best_step: int | None
    stopped: bool = False

    @classmethod
    def of(cls, loop: Loop, record: Mapping[str, Any], **options: Any) -> "Fitted":
        """The result of a loop; ``options`` are those of `loralens.training.read_injection`."""
        # The record names the versions because the numbers of two releases may differ. The values of the caller come
        # last, so that they may replace others.
        training = {**loop.record, "loralens": __version__, "torch": torch.__version__, **record}
        adapter, stopped = loop.read(training=training, **options), loop.stopped and loop.done < loop.course.steps
        losses, evaluations = tuple(loop.losses), tuple(loop.evaluations)
        return cls(adapter, loop.injection, losses, evaluations, loop.done, loop.best_step, stopped)


@takes_options
def fit(
    model: nn.Module,
    batches: Batches,
    *,
    options: LoraOptions,
    course: Course | None = None,
    loss: Loss = own_loss,
    first_a: Adapter | None = None,
    watch: Watch | None = None,
    state: State | None = None,
    shard: bool = False,
    device: torch.device | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    record: Mapping[str, Any] | None = None,
) -> Fitted:
    """Train LoRA layers in a model, and return the adapter.

    Parameters
    ----------
    model : nn.Module
        The base, which stays on its device and in its dtype. The factors are float32 (float64 in a float64 model).
    batches : sequence, iterable or callable
        The batches 0, 1, 2 …: a list, a `DataLoader`, or a function of the batch's number, see
        `loralens.training.feed.Feed`. Several processes share them, and each must be given the same.
    course : Course, optional
        By default one round over the batches, with the defaults of `Course`.
    loss : callable
        ``loss(model, batch)`` returns a sum over the terms of the batch, such as its tokens, and their number (an int
        or a tensor). All terms of a step then weigh the same, however the step is divided into batches and among
        processes. A scalar alone is taken as a mean, and all batches of a step weigh the same: this is the loss of the
        whole step only if they have equally many terms. The default is the loss that a transformers model computes
        itself, ``model(**batch).loss``, with the labels counted that are not −100: see
        `loralens.training.own_loss.count_terms`.
    options : LoraOptions
        As for `loralens.training.inject`. With the start ``lora-ga``, `fit` computes the gradient of the first step. An
        adapter as ``start`` brings factors, magnitudes and heads; the targets and the ranks must then be those of the
        adapter: see `loralens.training.readout.start_options`.
    first_a : Adapter, optional
        An adapter whose A the run begins with, while B is 0. The ranks must be those of the adapter.
    watch : Watch, optional
        The functions that are called during training.
    state : State, optional
        The state from which to continue. On one machine the result is, bit for bit, that of a run without interruption.
        The model, the batches and the loss must be those of that run; everything else is compared. Batches that are
        drawn at random need the seed of that run.
    shard : bool
        Whether to divide the model among all processes (FSDP2).
    device : torch.device, optional
        The device on which a model is trained that is sharded; by default that of the model. A model that no GPU holds
        as a whole is given on the CPU, and its blocks are moved one by one.
    base_model, task_type : str, optional
        As for `loralens.training.read_injection`.
    record : mapping, optional
        Further values for the record in the adapter, as JSON holds them, for example a description of the data.

    Returns
    -------
    Fitted

    Raises
    ------
    OptionError
        The errors of `loralens.training.inject`; there are no batches; the loss is not a tensor; JSON cannot hold the
        record.
    DivergenceError
        The loss or its gradient is not finite. Nothing was updated with it, and earlier snapshots and states stay
        valid.
    MismatchError
        The state is of another run (method, rank, seed, course, modules …); the message names what differs.

    Notes
    -----
    After an error the layers are removed from the model. Processes that torch.distributed has joined train one adapter,
    with DDP or, if ``shard`` is True, with FSDP2. Equal seeds and equal batches in a step then give the adapter of a
    single process up to rounding.

    Batches are drawn from the caller's generators, and the training draws nothing from them: after
    ``torch.manual_seed(1)`` a `DataLoader` that shuffles gives the batches that it would give in a plain loop. Several
    processes must draw the same.
    """
    # The record is written only after the training.
    try:
        json.dumps(dict(record or {}))
    except (TypeError, ValueError) as error:
        what = f"the record cannot be kept with the adapter: {error}"
        raise OptionError(what, fix="give strings, Python's own numbers, lists and mappings of these") from error
    # Everything that can be refused is refused before the model is changed.
    world = World.current(shard=shard)
    device = _training_device(model, device, shard=shard)
    feed = Feed(batches, world=world, device=device)
    if course is None:
        if not feed.length:
            what = "the batches have no length, so the number of steps is unknown"
            raise OptionError(what, fix="give course=Course(steps=…)")
        course = Course(steps=feed.length)
    gradients = partial(first_gradients, model=model, feed=feed, course=course, loss=loss, world=world, device=device)
    start = options.start
    drawn = {**vars(options), "start": None if isinstance(start, Adapter) else start}
    injection = inject(model, gradients=gradients, **drawn)
    try:
        if isinstance(start, Adapter):
            injection = start_from(injection, start)
        if first_a is not None:
            injection = start_with_a(injection, first_a)
        loop = Loop(
            injection, feed, course, loss=loss, world=world, watch=watch or Watch(), seed=injection.seed, device=device
        )
        loop.run(state)
    # The model is restored after Ctrl-C too.
    except BaseException:
        # FSDP2 has replaced the parameters of a sharded model, so that the original layers cannot be restored.
        if not shard:
            injection.remove()
        raise
    return Fitted.of(loop, record or {}, base_model=base_model, task_type=task_type)


def _training_device(model: Any, device: torch.device | None, *, shard: bool) -> torch.device:
    """The device on which a model is trained, which is its own unless it is sharded."""
    # The CPU for what is no model, or has no parameters, which `inject` refuses.
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    own = CPU if parameter is None else parameter.device
    # Without shards the model would have to be moved as a whole, which is the caller's to do.
    if device is not None and device != own and not shard:
        raise OptionError(f"the model is on {own}, not on {device}", fix=f"move it there: model.to({str(device)!r})")
    return device or own
