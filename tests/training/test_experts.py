"""Stacks of experts: our own loop leaves them out and says so, and TRL adapts them."""

import logging
from pathlib import Path
from typing import Any

import pytest

import loralens
from loralens import OptionError
from loralens.training import inject
from tests import models
from tests.training.test_ranks import mixture

torch = pytest.importorskip("torch")


def test_our_loop_leaves_stacks_out_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "loralens"):
        made = inject(mixture("mixtral"), rank=2)
    assert not any("experts" in name for name in made.layers)
    assert "all-linear leaves out 85.9 % of the weights of the layers" in caplog.text
    assert "experts.gate_up_proj (2 of them)" in caplog.text
    with pytest.raises(OptionError, match="is a stack of experts, which is not adapted here") as refused:
        inject(mixture("mixtral"), rank=2, targets="down_proj")
    assert "--backend trl" in refused.value.fix


@pytest.mark.live
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_trl_adapts_stacks_and_the_file_is_what_was_trained(name: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pair: Any = (mixture(name), models.tokenizer())
    options: dict[str, Any] = {"task": "causal-lm", "data": models.TEXTS, "threads": 1}
    result = loralens.train(
        model=pair,
        backend="trl",
        rank=2,
        steps=3,
        lr=1e-2,
        batch=4,
        eval=models.TEXTS,
        output=tmp_path / "a",
        **options,
    )
    assert any(".experts.down_proj[1]" in module for module in result.adapter)
    again = loralens.evaluate(tmp_path / "a", model=pair, **options)
    assert next(iter(again.evaluations)).measures["loss"] == pytest.approx(result.evaluations[-1][1]["loss"], rel=1e-4)
    assert result.evaluations[-1][1]["loss"] < result.evaluations[0][1]["loss"]
