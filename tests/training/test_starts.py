"""The starts that are made of a weight or of a gradient, and those that an adapter brings."""

from pathlib import Path
from typing import Any, get_args

import pytest

import loralens
from loralens.choices import ScaleRule, StartName
from loralens.core import Attachment
from loralens.training import Course, fit
from tests import models

torch = pytest.importorskip("torch")

IDS = torch.tensor([[3, 4, 5, 9, 2], [7, 7, 3, 1, 6]])
BATCHES = [{"input_ids": IDS, "labels": IDS}, {"input_ids": IDS.flip(0, 1), "labels": IDS.flip(0, 1)}]


# ---- Every start with every scale and with magnitudes


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("rule", get_args(ScaleRule))
@pytest.mark.parametrize("start", get_args(StartName))
def test_every_start_ends_as_what_the_file_says(start: Any, rule: Any, magnitude: bool, tmp_path: Path) -> None:
    model = models.llama()
    made = fit(
        model, BATCHES, course=Course(2, lr=1e-2), targets=["q_proj", "down_proj"], rank=3, rank_pattern={"q_proj": 2},
        start=start, scale_rule=rule, magnitude=magnitude,
    )  # fmt: skip
    with torch.no_grad():
        trained = model(input_ids=IDS).logits
        made.injection.remove()
        plain = model(input_ids=IDS).logits
        loralens.save(made.adapter, tmp_path / "a")
        with Attachment(model, loralens.load(tmp_path / "a")).on():
            again = model(input_ids=IDS).logits
    torch.testing.assert_close(again, trained, rtol=1e-4, atol=1e-5)
    assert (trained - plain).abs().max() > 1e-3
