"""Sentences of the summary that hold counts, signs and medians, each against numbers worked out here."""

import re

import numpy as np
import pytest

import loralens
from loralens.reporting.sentences import summary_sentences
from loralens.reporting.subject import measure_collection
from tests.reporting.adapters import measured

RANK = 8


def turned(angle, *, size=64):
    """An update of one direction, turned by an angle out of the first axis."""
    B, A = np.zeros((size, 1)), np.zeros((1, size))
    B[0], B[1], A[0, 0] = np.cos(angle), np.sin(angle), 1
    return loralens.Adapter(modules={f"model.layers.{i}.q": loralens.LowRank(B, A) for i in range(3)})


@pytest.mark.parametrize(
    ("angle", "cosine", "verdict"),
    [(2.8, "−0.942", "."), (np.arccos(0.15), "+0.150", ": real, but small."), (np.arccos(0.25), "+0.250", ".")],
)
def test_two_updates_have_their_cosine_and_a_verdict(angle: float, cosine: str, verdict: str) -> None:
    subjects = measured({"a": turned(0.0), "b": turned(angle)})
    (text,) = [
        said
        for said in summary_sentences(subjects, [], measure_collection(subjects), None)
        if "The two updates" in said
    ]
    z = abs(float(cosine.replace("−", "-"))) * 64 * 3**0.5
    away = "more than 100" if z > 100 else f"{z:.1f}"
    assert text == f"The two updates have a cosine {cosine}, {away} standard deviations from chance{verdict}"


@pytest.mark.slow
def test_the_largest_of_many_cosines_is_held_against_as_many():
    """Unrelated updates of one direction: the largest of 28 cosines is beyond 3 standard deviations as a rule."""
    beyond = alarms = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        drawn = {
            name: loralens.Adapter(modules={"q": loralens.LowRank(rng.normal(size=(64, 1)), rng.normal(size=(1, 64)))})
            for name in "abcdefgh"
        }
        subjects = measured(drawn)
        (text,) = [
            said
            for said in summary_sentences(subjects, [], measure_collection(subjects), None)
            if said.startswith("The largest |cos")
        ]
        beyond += float(re.findall(r", ([\d.]+) standard", text)[0]) > 3
        alarms += "which is what unrelated adapters would have" not in text
    assert beyond >= 3
    assert alarms == 0
