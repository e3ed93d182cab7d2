"""Layers that a step does not reach are named: their updates would stay 0."""

import logging
from typing import Any

import pytest

from loralens.training import Course, fit
from tests.training.pair_loaders import Partly

torch = pytest.importorskip("torch")


def run(model: Any, **options: Any) -> Any:
    batch = torch.ones(2, 3)
    return fit(
        model, [batch], loss=lambda model, batch: model(batch).square().mean(), rank=1, course=Course(2), **options
    )


def test_a_layer_that_is_not_called_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "loralens"):
        run(Partly(calls_all=False), targets=["called", "passed"])
    said = "the first step gives no gradient to passed, which the model has not called"
    assert [record.getMessage().split("\n")[0] for record in caplog.records] == [said]
    assert "give passed to exclude=" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "loralens"):
        run(Partly(calls_all=False), targets="called")
        run(Partly(calls_all=True), targets=["called", "passed"])
        run(Partly(calls_all=True), targets=["called", "passed"], freeze_a=True)
    assert not caplog.records
