"""The first screen of a report: each number of its table, and its sentence, against values worked out here."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens import Diagnosis
from loralens.core import Scaling
from loralens.reporting.report_files import report_html, report_markdown
from loralens.tables import signed
from tests.bases import single
from tests.reporting.adapters import dense_of, drawn, measured, report
from tests.reporting.reading import Report, rows

NAMES = [f"model.layers.{block}.self_attn.{kind}" for block in range(2) for kind in ("q_proj", "v_proj")]
SHAPES = {"q_proj": (40, 32), "v_proj": (24, 32)}
RANK = 6


def shape_of(name: str) -> tuple[int, int]:
    return SHAPES[name.rsplit(".", 1)[1]]


def made(seed: int, fall: float) -> loralens.Adapter:
    rng = np.random.default_rng(seed)
    modules = {}
    for k, name in enumerate(NAMES):
        out, in_ = shape_of(name)
        B = rng.standard_normal((out, RANK)) * fall ** np.arange(RANK) * (1 + k) / 40
        A = rng.standard_normal((RANK, in_))
        scaling = Scaling("alpha/r", 2 * RANK, RANK)
        modules[name] = loralens.LowRank(B.astype(np.float32), A.astype(np.float32), 2.0, scaling=scaling)
    return loralens.Adapter(modules=modules, base_model="tiny/base")


@pytest.fixture(scope="module", params=[np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def held(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest):
    folder = tmp_path_factory.mktemp("held")
    rng = np.random.default_rng(3)
    weights = {name: rng.standard_normal(shape_of(name)).astype(request.param) for name in NAMES}
    single(folder / "base", {f"{name}.weight": W for name, W in weights.items()}, config={"model_type": "llama"})
    adapters = {"steep": made(1, 0.2), "flat": made(2, 0.95)}
    for label, adapter in adapters.items():
        loralens.save(adapter, folder / label)
    result = loralens.report(*(folder / label for label in adapters), base=folder / "base", intruders=False)
    return result, adapters, {name: W.astype(np.float64) for name, W in weights.items()}, folder


def table_of(document: Report) -> dict[str, dict[str, str]]:
    assert document.verdicts is not None
    return rows(document.verdicts)


def needed(dense: dict[str, np.ndarray]) -> int:
    """The lowest rank for all modules that keeps 99 % of the energy."""
    spectra = [np.linalg.svd(D, compute_uv=False)[:RANK] for D in dense.values()]
    whole = math.fsum(float((s**2).sum()) for s in spectra)
    return next(r for r in range(1, RANK + 1) if math.fsum(float((s[r:] ** 2).sum()) for s in spectra) <= 0.01 * whole)


@pytest.mark.parametrize("label", ["steep", "flat"])
def test_every_number_of_the_first_table(held, label: str, tmp_path: Path) -> None:
    result, adapters, weights, _ = held
    dense, row = dense_of(adapters[label]), table_of(result.document)[label]
    record = next(one for one in result.record()["verdicts"] if one["adapter"] == label)
    rank = needed(dense)
    assert row["rank needed"] == f"{rank} of {RANK}"
    assert (record["rank_needed"], record["rank"]) == (rank, RANK)
    loralens.compress(adapters[label], output=tmp_path / "small", energy=0.99)
    loralens.save(adapters[label], tmp_path / "whole")
    small, whole = ((tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("small", "whole"))
    assert record["saved"] == pytest.approx(1 - small / whole, abs=1e-3)
    strength = math.sqrt(sum((D**2).sum() for D in dense.values()) / sum((W**2).sum() for W in weights.values()))
    assert record["strength"] == pytest.approx(strength, rel=1e-5)
    lost = 0.0
    for name, D in dense.items():
        merged = (weights[name].astype(np.float32) + D.astype(np.float32)).astype(ml_dtypes.bfloat16)
        lost += float(((merged.astype(np.float64) - weights[name] - D) ** 2).sum())
    loss = math.sqrt(lost / sum((D**2).sum() for D in dense.values()))
    assert record["bf16_loss"] == pytest.approx(loss, rel=1e-3)
    for heading, key in (("saves", "saved"), ("strength", "strength"), ("bf16 loss", "bf16_loss")):
        shown = float(row[heading].removesuffix(" %") or 0) / 100
        assert shown == pytest.approx(record[key], rel=6e-3, abs=1e-9)
    found = [one for one in result.record()["findings"] if one["adapter"].endswith(label)]
    assert {level: record[f"{level}s"] for level in ("error", "warning")} == {
        level: len({one["code"] for one in found if one["level"] == level}) for level in ("error", "warning")
    }


def test_the_sentence_says_what_they_are_to_each_other_and_what_they_need(held) -> None:
    result, adapters, _, _ = held
    first, second = (dense_of(adapter) for adapter in adapters.values())
    inner = sum((first[name] * second[name]).sum() for name in NAMES)
    norms = math.sqrt(sum((D**2).sum() for D in first.values()) * sum((D**2).sum() for D in second.values()))
    headline = result.document.headline
    assert f"(cosine {signed(inner / norms)})" in headline
    assert f"steep could be smaller by {100 * result.record()['verdicts'][0]['saved']:.0f} %" in headline
    assert headline.count(".") == 1 + headline.count("0.")  # one sentence


def test_page_markdown_notebook_and_json_say_the_same(held) -> None:
    result = held[0]
    document = result.document
    for text in (result.to_html(), result.to_markdown("x_files"), result._repr_html_()):
        plain = text.replace("\\", "").replace("\u00a0", " ")
        assert document.headline in plain
        for row in table_of(document).values():
            assert all(cell in plain for cell in row.values())
    assert result.record()["headline"] == document.headline
    json.dumps(result.record(), allow_nan=False)


def test_what_is_broken_comes_first() -> None:
    subjects = measured({"a": drawn(1), "b": drawn(1)})
    wrong = Diagnosis("error", "non-finite", "holds NaN", adapter="b")
    document = report(subjects, [wrong])
    assert document.headline == "1 of 2 adapters do not work as they are: b."
    assert table_of(document)["b"]["verdict"] == "does not work as it is: a tensor holds NaN or Inf"
    assert table_of(document)["b"]["findings"] == "1 error"
    alone = report(measured({"b": drawn(1)}), [wrong])
    assert alone.headline == "b does not work as it is: a tensor holds NaN or Inf."
    warned = report(measured({"b": drawn(1)}), [replace(wrong, level="warning", code="spike")])
    assert warned.headline.startswith("b has 1 warning; rank ")  # a name keeps its letters
    spike = "one direction holds nearly all of the energy of a module of rank 4 or more"
    assert table_of(warned)["b"]["verdict"] == f"look at it first: {spike}"


def test_three_questions_are_answered_first() -> None:
    """Whether all is well, what the adapter is and changes, and what to do: in words, and commands to copy."""
    sound = report(measured({"a": drawn(1)}), [])
    questions = [question for question, _ in sound.answers]
    assert questions == ["Is it OK?", "What is it?", "What next?"]
    order, what, following = (answer for _, answer in sound.answers)
    assert order == "Yes: nothing in it looks wrong."
    assert "for tiny/base. ‖ΔW‖ is " in what
    assert re.match(r"`loralens (compress|doctor) ", following)
    fault = Diagnosis("error", "non-finite", "holds NaN", "train it again", adapter="a")
    order, _, following = (answer for _, answer in report(measured({"a": drawn(1)}), [fault]).answers)
    assert order == "No, it does not work as it is: a tensor holds NaN or Inf."
    assert following == "Train it again."
    for made in (report_html(sound), report_markdown(sound, "x")):
        assert all(question in made for question in questions)


def test_an_image_adapter_has_its_family_and_its_trigger_words() -> None:
    adapter = replace(drawn(1), metadata={"modelspec.trigger_phrase": "sksdragon"})
    _, (_, what), _ = report(measured({"a": adapter}), []).answers
    assert "Trigger words: sksdragon." in what
