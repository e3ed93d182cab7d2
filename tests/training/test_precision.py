"""Autocast, weights of 16 bits, and the scale of the loss that float16 needs."""

from typing import Any

import pytest

from loralens.training import Course, Watch, fit, inject
from loralens.training.loop import FIRST, STEPS, Precision
from tests import models
from tests.training.conftest import holder, randomise

torch = pytest.importorskip("torch")
nn = torch.nn

CPU = torch.device("cpu")
IDS = torch.randint(2, 24, (4, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}


def test_autocast_leaves_the_rows_of_a_frozen_embedding_as_they_are() -> None:
    model = holder("embedding", dtype=torch.float32)
    ids = torch.tensor([[0, 3, 8], [3, 3, 1]])
    before = model(ids).detach()
    made = inject(model, targets="layer", rank=3)  # A is 0, so that the update is
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(made.model(ids), before)
    randomise(made)
    wanted = made.model(ids).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = made.model(ids).detach()
    # The update is computed in bfloat16, of 8 bits, and the rows keep their 24.
    assert float((found - wanted).abs().max()) <= 2**-7 * float((wanted - before).abs().max())


@pytest.mark.parametrize(
    ("weights", "autocast", "wanted"),
    [
        ("float32", None, (False, "bfloat16", False)),
        ("float32", True, (True, "bfloat16", False)),
        ("bfloat16", True, (True, "bfloat16", False)),
        ("float16", None, (False, "float16", True)),
        ("float16", True, (True, "float16", True)),
    ],
)
def test_the_precision_follows_from_the_weights(weights: str, autocast: bool | None, wanted: Any) -> None:
    model = models.llama().to(getattr(torch, weights))
    found = Precision.of(model, CPU, autocast=autocast)
    assert (found.autocast, str(found.dtype), found.scaled) == (wanted[0], f"torch.{wanted[1]}", wanted[2])


def test_the_scale_of_the_loss_follows_infinite_gradients_as_torch_does() -> None:
    ours = Precision.of(models.llama().half(), CPU, autocast=None)
    ours.begin(terms=1)
    theirs = torch.amp.GradScaler("cpu")
    weight = nn.Parameter(torch.ones(1))
    optimiser = torch.optim.SGD([weight], lr=0.0)
    for step in range(STEPS + 20):
        bad = step in (3, 4, 9)
        weight.grad = torch.tensor([float("inf") if bad else 1.0])
        theirs.scale(torch.zeros(()))  # which makes its scale
        theirs.step(optimiser)
        theirs.update()
        assert ours.accepts(finite=not bad)
        assert ours.scale == theirs.get_scale()
    assert ours.scale == FIRST / 4


def trained(model: Any, **more: Any) -> Any:
    course = Course(steps=more.pop("steps", 3), lr=1e-2, **more.pop("course", {}))
    return fit(model, [BATCH], course=course, targets="*_proj", rank=2, **more)


@pytest.mark.parametrize("autocast", [None, True])
def test_float16_learns_what_float32_does(autocast: bool | None) -> None:
    wanted = trained(models.llama())
    found = trained(models.llama().half(), course={"autocast": autocast})
    assert found.losses == pytest.approx(wanted.losses, rel=5e-3)
    assert found.losses[-1] < found.losses[0]
    assert all(layer.B.dtype == torch.float32 for layer in found.injection.layers.values())


def test_a_step_that_float16_cannot_hold_is_left_out_and_the_scale_is_remembered() -> None:
    calls: list[int] = []

    def loss(model: Any, batch: Any) -> Any:
        calls.append(len(calls))
        value = model(**batch).loss
        return _overflowing(value) if len(calls) == 2 else value

    states: list[Any] = []
    watch = Watch(save=states.append, save_every=1)
    found = fit(models.llama().half(), [BATCH], course=Course(steps=4, lr=1e-2), loss=loss, targets="*_proj", rank=2,
                watch=watch)  # fmt: skip
    assert [state.record["scale"] for state in states] == [FIRST, FIRST / 2, FIRST / 2, FIRST / 2]
    for name, array in states[0].tensors.items():
        if name.startswith("trained."):
            assert (array == states[1].tensors[name]).all()
    assert all(value == value for value in found.losses)


def _overflowing(value: Any) -> Any:
    class Overflow(torch.autograd.Function):
        """An infinite gradient beside a finite loss, as an activation that overflows in the backward pass gives it."""

        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            return g * float("inf")

    return Overflow.apply(value)
