"""States: a run that goes on is the run in one go, bit for bit."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loralens import FormatError, MismatchError
from loralens.core import State
from loralens.formats.records.training import Training
from loralens.training import Course, Examples, Fitted, Watch, fit, task_named
from loralens.training.feed import shuffle_order
from tests import models
from tests.marks import slow_except

torch = pytest.importorskip("torch")


STEPS = 6
TASK = task_named("classification")
RNG = np.random.default_rng(0)
TEXTS = Examples([RNG.integers(2, 24, n).tolist() for n in (3, 9, 1, 6, 2, 8)], 0, [0, 1, 1, 0, 1, 0])
AFTER_EVERY_STEP = ("dropout", "muon", "patience")  # variants that go on after each of their steps
# One variant for each thing that is drawn: uniform and normal starts, frozen factors, and dropout.
DRAWING = ("adamw", "axes", "frozen-a", "dropout")
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"course": {"optimiser": "sgd", "lr": 0.1}},
    "dropout": {"dropout": 0.4, "course": {"base_dropout": True}},
    "accumulate": {"course": {"accumulate": 3, "clip": 0.1, "schedule": "cosine", "warmup": 0.3}},
    "dora": {"method": "dora"},
    "pissa": {"method": "pissa"},
    "olora": {"method": "olora"},
    "lora-ga": {"method": "lora-ga", "course": {"accumulate": 2}},
    "axes": {"scale_rule": "rslora", "start": "gaussian", "magnitude": True, "lr_ratio": 4.0, "freeze_a": True},
    "frozen-a": {"method": "frozen-a"},
    "betas": {"course": {"beta1": 0.5, "beta2": 0.9, "epsilon": 1e-3, "weight_decay": 0.1}},
    "muon": {"course": {"optimiser": "muon"}},
    "no head": {"heads": ()},
    "patience": {"patience": 2},
}


def run(
    state: State | None = None,
    *,
    dtype: Any = torch.float32,
    patience: int | None = None,
    steps: int = STEPS,
    stop: Any = None,
    save_every: int = 1,
    **more: Any,
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
        save=lambda one: states.append(copy.deepcopy(one)), save_every=save_every, stop=stop,
        evaluate=evaluate if patience else None, evaluate_every=1 if patience else 0, patience=patience,
    )  # fmt: skip
    options = {"heads": ["classifier"], "rank": 2, "targets": ["query", "value"], **more}
    course = Course(steps, **{"lr": 1e-2, **options.pop("course", {})})
    order = shuffle_order(6, size=2, seed=0)
    return fit(
        model, TASK.batches(TEXTS, order), course=course, loss=TASK.loss, watch=watch, state=state, **options
    ), states


def numbers(found: Fitted) -> dict[str, bytes]:
    pairs = {f"{name}.{part}": getattr(module, part) for name, module in found.adapter.items() for part in "AB"}
    return {name: np.asarray(array).tobytes() for name, array in pairs.items()} | {
        name: extra.tensor.read().tobytes() for name, extra in found.adapter.extra.items()
    }


@pytest.mark.some(1)
@pytest.mark.parametrize("variant", slow_except(VARIANTS, *AFTER_EVERY_STEP))
def test_a_run_that_goes_on_is_the_run_in_one_go(variant: str) -> None:
    options = VARIANTS[variant]
    whole, states = run(**options)
    last = 4 if variant == "patience" else STEPS
    assert [state.step for state in states] == list(range(1, last + 1))
    # The other variants go on after the first, a middle and the last steps alone.
    for state in states if variant in AFTER_EVERY_STEP else (states[0], states[STEPS // 2], states[-1]):
        rest, _ = run(state, **options)
        assert numbers(rest) == numbers(whole)
        assert rest.losses == whole.losses[state.step :]
        assert (rest.steps, rest.best_step) == (whole.steps, whole.best_step)
    if variant in DRAWING:
        assert numbers(run(seed=1, **options)[0]) != numbers(whole)
    if variant == "patience":
        assert (whole.steps, whole.best_step) == (4, 2)


def test_a_run_that_is_told_to_stop_saves_its_state_and_goes_on() -> None:
    whole, _ = run()
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(len(asked) == 2)
        return asked[-1]

    part, states = run(stop=stop, save_every=100)
    assert (part.steps, part.stopped, len(part.losses)) == (3, True, 3)
    assert [state.step for state in states] == [3]
    rest, _ = run(states[0])
    assert numbers(rest) == numbers(whole)
    assert not rest.stopped


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "method": ({}, {"method": "lora+"}, r"method is 'lora' there, 'lora\+' here"),
    "rank": ({}, {"rank": 3}, "rank is 2 there, 3 here"),
    "frozen-a": ({"method": "frozen-a"}, {"method": "frozen-a", "seed": 9}, "seed is 0 there, 9 here"),
    "optimiser": ({}, {"course": {"optimiser": "sgd"}}, "optimiser is 'adamw' there, 'sgd' here"),
    "lr": ({}, {"course": {"lr": 0.5}}, r"lr is 0\.01 there, 0\.5 here"),
    "many": (
        {},
        {"method": "dora", "rank": 1, "alpha": 2, "seed": 3},
        r"method is .* here; rank is .* here; alpha is .* here; and 1 more",
    ),
}


@pytest.mark.some(2)
@pytest.mark.parametrize("other", OTHERS)
def test_the_state_of_other_options_is_refused_by_what_differs(other: str) -> None:
    first, second, words = OTHERS[other]
    _, states = run(**first)
    with pytest.raises(
        MismatchError, match=f"^the state is of another run: {words}\n  fix: resume with the same options"
    ):
        run(states[0], **second)


def test_a_state_that_was_written_and_read_is_gone_on_from(tmp_path: Path) -> None:
    whole, states = run(alpha=1 / 3)
    training = Training(tmp_path / "out")
    training.begin({}, overwrite=False)
    training.save(states[2])
    found = training.resume({})
    training.release()
    assert found is not None
    assert found.run == states[2].run
    assert numbers(run(found, alpha=1 / 3)[0]) == numbers(whole)


FACTOR = "bert.encoder.layer.0.attention.self.query.A"
# Damages of the tensors of a state, of the name and the array, and of the other values.
DAMAGES: dict[str, tuple[str, Any, str]] = {
    "shape": (f"optimiser.{FACTOR}.exp_avg", np.transpose, "the optimiser is damaged: it has .*query.A.exp_avg"),
    "no factor": (f"trained.{FACTOR}", None, "query.A is in one of them only"),
    "no best": (f"best.{FACTOR}", None, "query.A is in one of them only"),
}


def test_a_damaged_state_is_refused_by_what_is_damaged() -> None:
    state = run(patience=2)[1][0]

    def refused(state: State, words: str) -> None:
        with pytest.raises((FormatError, MismatchError), match=words) as error:
            run(state, patience=2)
        assert error.value.fix

    for name, change, words in DAMAGES.values():
        tensors = dict(state.tensors)
        array = tensors.pop(name)
        refused(replace(state, tensors=tensors | ({name: change(array)} if change else {})), words)
    refused(replace(state, record={**state.record, "waited": None}), "counts of steps")
    refused(replace(state, step=-1), "counts of steps")
