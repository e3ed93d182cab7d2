"""Sentences of the summary that hold counts, signs and medians, each against numbers worked out here."""

import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens.analysis.amplification import measure_amplification
from loralens.analysis.doctor import examine_all
from loralens.analysis.merge_effect import Base
from loralens.core.lazy import LazyArray
from loralens.core.weights import weights_of
from loralens.reporting.adapter_sections import base_section
from loralens.reporting.document import PageTable, Picture
from loralens.reporting.sentences import summary_sentences
from loralens.reporting.subject import BaseMeasurements, measure_collection, measure_subject
from loralens.verbs.pages.page_tables import subject_tables
from tests.reporting.adapters import dialect, measured
from tests.reporting.reading import cells

WIDTH, RANK = 48, 8


def against_base(dtype=ml_dtypes.bfloat16):
    """A subject whose ΔW lies where W does nothing (1), where it does most (2), and anywhere (3)."""
    rng = np.random.default_rng(0)
    W = np.zeros((WIDTH, WIDTH))
    W[:32, :32] = np.diag(np.linspace(2, 1, 32).astype(ml_dtypes.bfloat16))
    dead, top = np.eye(WIDTH)[:, -RANK:], np.eye(WIDTH)[:, :RANK]
    anywhere = [np.linalg.qr(rng.standard_normal((WIDTH, RANK)))[0] for _ in range(6)]
    sides = [(dead, dead), (top, top), (top, top), *zip(anywhere[::2], anywhere[1::2], strict=True)]
    modules = {
        f"model.layers.{i}.q": loralens.LowRank(1e-3 * 4.0**-i * U, V.T.copy()) for i, (U, V) in enumerate(sides)
    }
    adapter = loralens.Adapter(modules=modules)
    tensors = {f"{name}.weight": LazyArray.of(W.astype(dtype)) for name in modules}
    weights = weights_of(modules, tensors).modules
    found = measure_amplification(adapter, weights, top=False, exact=True)
    (examination,) = examine_all({"a": adapter}, base=Base("the base", tensors))
    held = BaseMeasurements(amplified=found)
    return measure_subject(examination, "a", dialect(), against_base=held), W, sides


def projections(W):
    """‖UᵀWV‖² of uniform U and V, 4000 draws."""
    rng = np.random.default_rng(1)
    P, Q = (np.linalg.qr(rng.standard_normal((4000, WIDTH, RANK)))[0] for _ in range(2))
    return ((P.swapaxes(1, 2) @ W @ Q) ** 2).sum(axis=(1, 2))


def test_modules_far_from_chance_are_counted_on_both_sides_beside_how_many_chance_gives() -> None:
    one, W, sides = against_base()
    draws = projections(W)
    z = (np.array([np.sum((U.T @ W @ V) ** 2) for U, V in sides]) - draws.mean()) / draws.std()
    chance = len(sides) * np.mean(np.abs(draws - draws.mean()) > 3 * draws.std())
    assert z[0] < -3 < 3 < z[1]
    count = int(np.sum(np.abs(z) > 3))
    assert count == 3
    (text,) = [said for said in summary_sentences([one], [], None, None) if "stronger or weaker" in said]
    far, total, limit, expected = re.findall(r"In (\d+) of (\d+) .* more than (\d) .* give ([\d.]+) such", text)[0]
    assert (int(far), int(total), int(limit)) == (count, len(sides), 3)
    assert float(expected) == pytest.approx(chance, abs=4 * (len(sides) * chance / 4000) ** 0.5 + 0.35 * chance)
    parts = base_section([replace(one, tables=subject_tables(one))], "the base").parts
    (picture,) = [part for part in parts if isinstance(part, Picture) and part.title == "What ΔW amplifies"]
    counted = f"{count} of {len(sides)} modules are more than 3 standard deviations from chance"
    assert f"{counted}; chance alone would give {expected}" in picture.panels[0].remark
    (table,) = [part for part in parts if isinstance(part, PageTable) and part.table.title == "Amplification by kind"]
    assert cells(table)[0][-2:] == [str(count), expected]


def test_what_a_merge_loses_is_the_median_and_the_worst() -> None:
    one, W, _ = against_base()
    rounded = W.astype(ml_dtypes.bfloat16).astype(np.float64)
    errors = {}
    for name, module in one.adapter.items():
        D = module.dense()
        after = (rounded + D).astype(ml_dtypes.bfloat16).astype(np.float64)
        errors[name] = np.linalg.norm(after - rounded - D) / np.linalg.norm(D)
    (text,) = [
        said for said in summary_sentences([one], [], None, None) if said.startswith("A merge into bfloat16 weights")
    ]
    middle, worst, name = re.findall(
        r"an error of ([\d.]+)\s% of ‖ΔW‖ in the median module and of ([\d.]+)\s% in the worst, (.*)\.", text
    )[0]
    assert float(middle) / 100 == pytest.approx(np.median(list(errors.values())), rel=0.02)
    assert float(worst) / 100 == pytest.approx(max(errors.values()), rel=0.02)
    assert errors[name] == pytest.approx(max(errors.values()), rel=1e-6)
    assert float(worst) > float(middle) + 1


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


def test_the_nearest_to_each_other_may_be_opposite() -> None:
    subjects = measured({"a": turned(0.0), "b": turned(np.arccos(0.3)), "c": turned(np.pi - 0.1)})
    cosines = {"ab": 0.3, "ac": -np.cos(0.1), "bc": np.cos(np.pi - 0.1 - np.arccos(0.3))}
    assert max(cosines, key=lambda pair: abs(cosines[pair])) == "ac"
    said = summary_sentences(subjects, [], measure_collection(subjects), None)
    assert any(
        text.startswith(
            f"The largest |cosine| of two adapters is that of a and c: cosine −{np.cos(0.1):.3f}, more than 100"
        )
        for text in said
    )
    assert any(
        text.startswith("The conflict with the largest effect is between a and c in blocks 0–2, q: cosine −0.995")
        for text in said
    )


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
