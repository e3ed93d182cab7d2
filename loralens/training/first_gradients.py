"""The gradient of the first step of a run, along which `loralens.training.initialisation` starts."""

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from loralens.core.training import State
from loralens.errors import OptionError
from loralens.training.blocks import recompute_blocks
from loralens.training.course import Course
from loralens.training.feed import Batches, Feed, move_batch
from loralens.training.initialisation import weight_gradients
from loralens.training.losses.returned import Loss, loss_and_count
from loralens.training.precision import Precision
from loralens.training.state import draws_of
from loralens.training.world import World

ComputeGradients = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def first_gradients(
    model: nn.Module,
    batches: Batches,
    course: Course,
    *,
    loss: Loss,
    world: World,
    device: torch.device,
    state: State | None,
) -> ComputeGradients:
    """A function from weights by name to their gradients in the first step of a run.

    The batches are drawn as the run draws them, which begins anew afterwards. A run that is resumed computes the same
    gradients again: it has to subtract the pair with which it began.
    """

    def compute(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if world.size > 1:
            raise OptionError("lora-ga takes the gradient of one process", fix="train in one process, or start kaiming")
        feed = Feed(batches, world=world, device=device)
        if state is not None:
            feed.begin(draws_of(state) or feed.first_draws)
        precision = Precision.of(model, device, autocast=course.autocast)

        def add_gradients() -> None:
            for turn in range(course.accumulate):
                _backward(model, move_batch(feed[turn], device), loss, precision)

        # The caller's random numbers stay as they are, whatever the model draws.
        generators = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        with closing(feed), generators, recompute_blocks(model, on=course.checkpointing), torch.enable_grad():
            return weight_gradients(model, weights, add_gradients)

    return compute


def _backward(model: nn.Module, batch: Any, loss: Loss, precision: Precision) -> None:
    with precision.context():
        result = loss(model, batch)
    summed, over = loss_and_count(result)
    if not precision.begun:
        precision.begin(float(over))
    # Only the directions of the gradient count, so that neither the scale nor the number of terms is divided out.
    (summed * precision.scale).backward()  # type: ignore[no-untyped-call]
