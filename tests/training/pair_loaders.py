"""What two processes, or one alone, see of a `DataLoader`, and what they learn from masked labels."""

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from loralens import OptionError
from loralens.core import State
from loralens.training import Course, Watch, fit
from loralens.training.world import World
from tests import models

TEXTS = 16


class Shuffled:
    """An iterable that shuffles its rounds with Python's generator."""

    def __iter__(self) -> Iterator[Any]:
        rows = list(range(TEXTS))
        random.shuffle(rows)
        yield from (torch.tensor(rows[start : start + 2]) for start in range(0, TEXTS, 2))


def batches_of(kind: str, noise: list[float]) -> Any:
    """Batches of two rows; a loader draws one more number for each, as an augmentation would."""
    options: dict[str, Any] = {}

    def collate(rows: Any) -> Any:
        noise.append(float(torch.rand(())))
        return torch.stack(rows)

    if kind == "python":
        return Shuffled()
    if kind == "own generator":
        options["generator"] = torch.Generator().manual_seed(3)
    options["shuffle"] = True
    return DataLoader(torch.arange(TEXTS), batch_size=2, collate_fn=collate, **options)  # type: ignore[arg-type]


def seen(kind: str, *, steps: int | None = None, state: State | None = None) -> dict[str, Any]:
    """The rows that this process has seen, in order; all processes have the same seed."""
    torch.manual_seed(4)
    random.seed(4)
    rows: list[int] = []
    noise: list[float] = []
    states: list[State] = []

    def loss(model: Any, batch: Any) -> Any:
        rows.extend(batch.tolist())
        return model(batch.float()[:, None]).square().mean()

    model = nn.Sequential(nn.Linear(1, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    watch = Watch(save=states.append, save_every=3)
    course = None if steps is None else Course(steps, lr=1e-3)
    made = fit(model, batches_of(kind, noise), course=course, loss=loss, rank=1, watch=watch, state=state)
    return {"rows": rows, "noise": noise, "steps": made.steps, "losses": made.losses, "states": states}


def scenario(kind: str) -> dict[str, Any]:
    """Two rounds, and what goes on after three steps."""
    whole = seen(kind, steps=8)
    state = World.current().from_main(lambda: whole["states"][0])
    return {"whole": whole, "rest": seen(kind, steps=8, state=state)}


def masked(*, shard: bool = False, accumulate: int) -> dict[str, Any]:
    """A few steps by the model's own loss, on parts with very different numbers of labels."""
    from tests.training.test_own_loss import language, parts_of

    course = Course(3, lr=0.5, optimiser="sgd", warmup=0, clip=0, accumulate=accumulate)
    parts = parts_of(language(), [1, 1, 2, 4])
    made = fit(models.llama().double(), parts, course=course, targets="*_proj", rank=2, shard=shard)
    numbers = {f"{name}.{part}": getattr(module, part) for name, module in made.adapter.items() for part in "BA"}
    return {"losses": made.losses, "numbers": numbers}


class Partly(nn.Module):
    """A model that calls one of its layers, or both."""

    def __init__(self, *, calls_all: bool) -> None:
        super().__init__()
        self.called, self.passed = nn.Linear(3, 3), nn.Linear(3, 3)
        self.calls_all = calls_all

    def forward(self, x: Any) -> Any:
        """The output of the layers that are called."""
        return self.called(self.passed(x) if self.calls_all else x)


def unreached() -> str:
    """What a process is told of a layer that the model does not call."""
    batch = torch.ones(2, 3)
    try:
        fit(
            Partly(calls_all=False),
            [batch] * 2,
            loss=lambda model, batch: model(batch).square().mean(),
            rank=1,
            course=Course(1),
        )
    except OptionError as error:
        return error.what
    return ""


KINDS = ("shuffled", "own generator", "python")


def together() -> dict[str, Any]:
    """What one of two processes comes to."""
    found: dict[str, Any] = {kind: scenario(kind) for kind in KINDS}
    return found | {"ddp": masked(accumulate=2), "shard": masked(accumulate=2, shard=True), "unreached": unreached()}


def alone() -> dict[str, Any]:
    """What one process comes to that takes all batches of a step."""
    return {"masked": masked(accumulate=4)}
