"""The loop: what one update is, whatever a step is cut into, and what is called on the way."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from loralens import DivergenceError, OptionError
from loralens.training import Course, Examples, Fitted, Step, Watch, fit, task_named
from loralens.training import course as optimisers
from loralens.training.layers import LoRALayer
from tests import models
from tests.marks import slow_except
from tests.training.conftest import peft_beside

torch = pytest.importorskip("torch")
nn = torch.nn

LENGTHS = (3, 9, 1, 6, 2, 8, 5, 4)  # tokens of each text: no two batches weigh alike


def texts() -> Examples:
    rng = np.random.default_rng(1)
    return Examples([rng.integers(2, 24, length).tolist() for length in LENGTHS], 0)


def batches(size: int) -> Any:
    some = texts()
    return [TASK.draw(some, range(start, start + size)) for start in range(0, len(LENGTHS), size)]


TASK = task_named("causal-lm")


def trained(size: int = 8, *, model: Any = None, steps: int = 1, watch: Watch | None = None, **more: Any) -> Fitted:
    """A few steps of SGD in float64 on batches of ``size`` texts, eight a step."""
    course = {"lr": 0.5, "optimiser": "sgd", "warmup": 0.0, "clip": 0.0, **more.pop("course", {})}
    options = {"targets": "*_proj", "rank": 2, **more}
    return fit(
        model or models.llama().double(),
        batches(size),
        course=Course(steps, accumulate=8 // size, **course),
        loss=TASK.loss,
        watch=watch,
        **options,
    )


class Quadratic(nn.Module):
    """Its gradient is known: the loss is the sum over the batch of (w·x)² / 2 for a head w."""

    def __init__(self, w: Any) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([w]))

    def forward(self, x: Any) -> Any:
        return self.head(x) + 0 * self.body(x).sum()


def headed(course: Course, *, model: Any = None, x: Any = (1.0, 0.0), **more: Any) -> tuple[Any, Fitted]:
    model = model or Quadratic((3.0, 4.0)).double()
    found = fit(
        model, [torch.tensor([x], dtype=torch.float64)], course=course, targets="body", rank=1, heads=["head"],
        loss=lambda model, x: model(x).square().sum() / 2, **more,
    )  # fmt: skip
    return model.head.weight.detach()[0].numpy(), found


def test_plain_descent_and_its_clipping() -> None:
    steps: list[Step] = []
    watch = Watch(on_step=steps.append)
    free, _ = headed(Course(1, lr=0.1, optimiser="sgd", warmup=0, clip=0), watch=watch)
    np.testing.assert_allclose(free, [3 - 0.1 * 3, 4])  # the gradient is (w·x) x = (3, 0)
    clipped, _ = headed(Course(1, lr=0.1, optimiser="sgd", warmup=0, clip=1.5), watch=watch)
    np.testing.assert_allclose(clipped, [3 - 0.1 * 1.5, 4], rtol=1e-6)
    unclipped, _ = headed(Course(1, lr=0.1, optimiser="sgd", warmup=0, clip=3.5), watch=watch)
    np.testing.assert_allclose(unclipped, free)
    assert [(step.number, step.loss, step.norm, step.size) for step in steps] == [(1, 4.5, 3.0, 1)] * 3


def test_the_rates_are_those_of_the_course_and_the_method() -> None:
    rates: list[list[float]] = []

    class Spy(optimisers.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    course = Course(6, lr=0.1, schedule="linear", warmup=0.34, optimiser="sgd")
    steps: list[Step] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimisers, "SGD", Spy)
        fit(
            models.llama(), batches(8), course=course, loss=TASK.loss, targets="q_proj", rank=2, method="lora+",
            watch=Watch(on_step=steps.append),
        )  # fmt: skip
    assert rates == [[pytest.approx(0.1 * course.factor(s)), pytest.approx(1.6 * course.factor(s))] for s in range(6)]
    assert [step.lr for step in steps] == [pytest.approx(0.1 * course.factor(s)) for s in range(6)]


@pytest.mark.parametrize("method", slow_except(["lora", "rslora", "dora"], "dora"))
def test_twenty_steps_of_adamw_are_pefts(method: str) -> None:
    peft = pytest.importorskip("peft")
    assert peft
    model, found = models.llama().double(), []
    ids = [torch.randint(2, 24, (4, 9), generator=torch.Generator().manual_seed(s)) for s in range(20)]
    feed = [{"input_ids": one, "labels": one} for one in ids]
    course = Course(20, lr=1e-2, warmup=0, clip=0, weight_decay=0.01)
    plain = copy.deepcopy(model)
    from loralens.training.injection import inject

    theirs = peft_beside(inject(copy.deepcopy(model), targets="*_proj", rank=4, method=method), plain)
    ours = fit(model, feed, course=course, targets="*_proj", rank=4, method=method)
    optimiser = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)
    for batch in feed:
        optimiser.zero_grad()
        loss = theirs(**batch).loss
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    np.testing.assert_allclose(ours.losses, found, rtol=1e-6)
    assert abs(found[0] - found[-1]) > 1e-2


def test_the_callers_random_numbers_and_modes_are_as_before() -> None:
    model = models.llama()
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    made = trained(
        model=model, steps=2, dropout=0.5, watch=Watch(evaluate=lambda model: {"loss": 1.0}, evaluate_every=1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    made.injection.remove()
    assert {name: module.training for name, module in model.named_modules()} == modes


def watched(values: list[float], **more: Any) -> tuple[Fitted, list[tuple[int, Any]], list[Any]]:
    """A run whose evaluations give these values, and a copy of what was trained at each of them."""
    seen: list[tuple[int, Any]] = []
    kept: list[Any] = []
    left = iter(values)

    def evaluate(model: Any) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        kept.append(model.get_submodule("model.layers.0.self_attn.q_proj").B.detach().clone().numpy())
        return {"loss": next(left)}

    watch = Watch(evaluate=evaluate, on_evaluation=lambda *one: seen.append(one), evaluate_every=2, **more)
    return trained(steps=10, watch=watch), seen, kept


def test_evaluations_come_before_the_first_step_and_after_the_last() -> None:
    found, seen, _ = watched([5, 4, 3, 2, 1, 0])
    assert [step for step, _ in seen] == [0, 2, 4, 6, 8, 10]
    assert found.evaluations == tuple(seen)
    assert (found.steps, found.best_step) == (10, None)


@pytest.mark.parametrize("values", [[5, 3, 4, 3, 9, 9], [5, 3, 4, float("nan"), 3, 0]])
def test_patience_ends_a_run_and_the_best_is_kept(values: list[float]) -> None:
    found, seen, kept = watched(values, patience=3)
    assert [step for step, _ in seen] == [0, 2, 4, 6, 8]
    assert (found.steps, found.best_step) == (8, 2)
    best = found.adapter["model.layers.0.self_attn.q_proj"].B
    np.testing.assert_array_equal(best, kept[1])
    assert not np.array_equal(best, kept[-1])


def test_snapshots_are_the_adapter_as_it_then_is() -> None:
    found: dict[int, Any] = {}
    made = trained(steps=6, watch=Watch(snapshot=lambda step, adapter: found.update({step: adapter}), snapshot_every=2))
    assert list(found) == [2, 4, 6]
    name = "model.layers.1.mlp.up_proj"
    np.testing.assert_array_equal(found[6][name].B, made.adapter[name].B)
    np.testing.assert_array_equal(found[2][name].B, trained(steps=2).adapter[name].B)


@contextmanager
def failing_at(step: int) -> Iterator[Any]:
    """A loss that is no number from a step on."""
    calls = []

    def loss(model: Any, batch: Any) -> Any:
        total, count = TASK.loss(model, batch)
        calls.append(1)
        return (total * float("nan") if len(calls) > step else total), count

    yield loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_no_number_stops_the_run_and_updates_nothing(accumulate: int) -> None:
    model, kept = models.llama().double(), []
    head = model.lm_head.weight.detach().clone()
    watch = Watch(snapshot=lambda step, adapter: kept.append((step, adapter)), snapshot_every=1)
    with failing_at(3 * accumulate) as loss, pytest.raises(DivergenceError) as refused:
        fit(
            model, batches(4), course=Course(9, accumulate=accumulate, warmup=0), loss=loss, targets="*_proj",
            heads=["lm_head"], rank=2, watch=watch,
        )  # fmt: skip
    where = "batch 3" if accumulate == 1 else "batches 6 to 7"
    assert refused.value.what == f"the loss is nan at step 4, {where}"
    assert "0.0005" in refused.value.fix
    assert [step for step, _ in kept] == [1, 2, 3]
    assert all(np.isfinite(module.B).all() for module in kept[-1][1].modules.values())
    assert not any(isinstance(module, LoRALayer) for module in model.modules())  # taken out again
    assert torch.equal(model.lm_head.weight, head)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    def loss(model: Any, batch: Any) -> Any:
        return model(**batch).logits.sum().mul(0).sqrt()  # 0, and its gradient is infinite times 0

    with pytest.raises(DivergenceError, match=r"the loss is 0 and its gradient nan at step 1, batch 0"):
        fit(models.llama(), batches(8), course=Course(2), loss=loss, targets="q_proj", rank=2)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda model, batch: model(**batch).logits.sum((1, 2)), "not one number"),
        (lambda model, batch: model(**batch).logits.sum().detach(), "not one number that depends on what is trained"),
        (lambda model, batch: None, "the loss is None, and not one number"),
    ],
)
def test_a_loss_that_cannot_be_learned_from_is_refused(loss: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        fit(models.llama(), batches(8), course=Course(2), loss=loss, targets="q_proj", rank=2)
