"""Courses: the learning rate of every step, and what cannot be."""

from math import cos, pi

import pytest

from loralens import OptionError
from loralens.training import Course

STEPS = 20


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.25, 0.9, 0.99])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_of_every_step_is_that_of_the_formula(schedule: str, warmup: float) -> None:
    course = Course(STEPS, schedule=schedule, warmup=warmup)  # type: ignore[arg-type]
    rising = round(warmup * STEPS)
    for step in range(STEPS):
        part = (step - rising) / (STEPS - rising) if step >= rising else 0.0  # of what follows the warm-up
        falling = {"constant": 1.0, "linear": 1 - part, "cosine": (1 + cos(pi * part)) / 2}[schedule]
        wanted = (step + 1) / (rising + 1) if step < rising else falling
        assert course.factor(step) == pytest.approx(wanted, rel=1e-12)
        assert 0 < course.factor(step) <= 1


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("steps", 0, "steps 0"),
        ("steps", "4", "steps '4' is not a whole number"),
        ("accumulate", 0, "accumulate 0"),
        ("lr", 1e300, r"lr 1e\+300 is not a number between 0 and 1e\+36"),
        ("lr", "1e-3", "lr '1e-3' is not a number"),
        ("lr", float("nan"), "lr nan"),
        ("weight_decay", 1.0, "weight_decay 1.0"),
        ("warmup", 1.0, "warmup 1.0"),
        ("clip", float("inf"), "clip inf"),
        ("optimiser", "adam", "optimiser 'adam' does not exist"),
        ("schedule", "step", "schedule 'step' does not exist"),
    ],
)
def test_what_cannot_be_is_refused(field: str, value: object, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Course(**{"steps": 4, field: value})  # type: ignore[arg-type]
