"""States: a run that goes on is the run in one go, bit for bit."""

import copy
from typing import Any

import numpy as np
import pytest

from loralens.core.training import State
from loralens.errors import MismatchError
from loralens.train.course import Course
from loralens.train.feed import shuffled
from loralens.train.fitting import Fitted, fit
from loralens.train.tasks import Examples, task_named
from loralens.train.watch import Watch
from tests import models

torch = pytest.importorskip("torch")

STEPS = 8
TASK = task_named("classification")
RNG = np.random.default_rng(0)
TEXTS = Examples([RNG.integers(2, 24, n).tolist() for n in (3, 9, 1, 6, 2, 8)], 0, [0, 1, 1, 0, 1, 0])
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"course": {"optimiser": "sgd", "lr": 0.1}},
    "dropout": {"dropout": 0.4, "course": {"base_dropout": True}},
    "accumulate": {"course": {"accumulate": 3, "clip": 0.1, "schedule": "cosine", "warmup": 0.3}},
    "dora": {"method": "dora"},
    "pissa": {"method": "pissa"},
    "frozen-a": {"method": "frozen-a"},
    "bfloat16 head": {"dtype": torch.bfloat16},
    "no head": {"heads": ()},
    "patience": {"patience": 2},
}


def run(
    state: State | None = None, *, dtype: Any = torch.float32, patience: int | None = None, **more: Any
) -> tuple[Fitted, list[State]]:
    """All of a run, or the rest of one, and the states on the way."""
    states: list[State] = []
    model = models.bert("BertForSequenceClassification", num_labels=2).to(dtype)
    values = {0: 9.0, 1: 3.0, 2: 1.0, 3: 2.0, 4: 3.0}  # the best is at the second step
    step = [state.step if state else 0]

    def evaluate(model: Any) -> dict[str, float]:
        found = {"loss": values.get(step[0], 5.0)}
        step[0] += 1
        return found

    if state:
        step[0] += 1
    watch = Watch(
        save=lambda one: states.append(copy.deepcopy(one)), save_every=1,
        evaluate=evaluate if patience else None, evaluate_every=1 if patience else 0, patience=patience,
    )  # fmt: skip
    options = {"heads": ["classifier"], "rank": 2, "targets": ["query", "value"], **more}
    course = Course(STEPS, **{"lr": 1e-2, **options.pop("course", {})})
    order = shuffled(6, size=2, seed=0)
    return fit(
        model, TASK.batches(TEXTS, order, seed=0), course=course, loss=TASK.loss, watch=watch, state=state, **options
    ), states


def numbers(found: Fitted) -> dict[str, bytes]:
    pairs = {f"{name}.{part}": getattr(module, part) for name, module in found.adapter.items() for part in "AB"}
    return {name: np.asarray(array).tobytes() for name, array in pairs.items()} | {
        name: extra.tensor.read().tobytes() for name, extra in found.adapter.extra.items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_goes_on_is_the_run_in_one_go(variant: str) -> None:
    options = VARIANTS[variant]
    whole, states = run(**options)
    last = 4 if variant == "patience" else STEPS - 1
    assert [state.step for state in states] == list(range(1, last + 1))
    for state in states:
        rest, _ = run(state, **options)
        assert numbers(rest) == numbers(whole)
        assert rest.losses == whole.losses[state.step :]
        assert (rest.steps, rest.best_step) == (whole.steps, whole.best_step)
    if variant != "pissa":  # which draws nothing
        assert numbers(run(seed=1, **options)[0]) != numbers(whole)
    if variant == "patience":
        assert (whole.steps, whole.best_step) == (4, 2)


def test_a_state_holds_its_own_copy() -> None:
    whole, states = run()
    again, _ = run(states[0])
    assert numbers(again) == numbers(whole)
    again, _ = run(states[0])  # a second time from the same
    assert numbers(again) == numbers(whole)


def test_the_state_of_another_run_is_refused() -> None:
    _, states = run()
    with pytest.raises(MismatchError, match=r"classifier\.bias is in one of them only"):
        run(states[0], heads=())
    with pytest.raises(MismatchError, match=r"query\.[AB] is \(.* there, \(.* here"):
        run(states[0], rank=3)
