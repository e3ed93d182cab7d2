"""Fit: from a model and batches to an adapter, and what its record says."""

import json
from typing import Any

import numpy as np
import pytest

from loralens import OptionError, __version__
from loralens.training import Course, fit, record_of
from tests import models
from tests.tolerances import TRAINED_LIVE

torch = pytest.importorskip("torch")
nn = torch.nn


def batches(count: int = 3) -> Any:
    made = [torch.randint(2, 24, (2, 6), generator=torch.Generator().manual_seed(s)) for s in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def test_the_record_says_how_it_was_made() -> None:
    course = Course(4, lr=0.01, schedule="cosine")
    found = fit(
        models.llama(), batches(), course=course, targets="q_proj", rank=2, alpha=8, method="rslora", seed=7,
        base_model="tiny/llama", task_type="CAUSAL_LM", record={"data": {"name": "three batches"}},
    )  # fmt: skip
    said = dict(record_of(found.adapter) or {})
    assert course.record.items() <= said.items()
    assert said["base_dropout"] is False
    assert {k: said[k] for k in ("method", "seed", "rank", "alpha", "steps_done", "best_step", "processes")} == {
        "method": "rslora", "seed": 7, "rank": 2, "alpha": 8.0, "steps_done": 4, "best_step": None, "processes": 1,
    }  # fmt: skip
    assert (said["loralens"], said["torch"]) == (__version__, torch.__version__)
    assert said["data"] == {"name": "three batches"}
    assert len(said["A0"]) == 16
    assert found.adapter.base_model == "tiny/llama"
    assert (found.adapter.config or {})["task_type"] == "CAUSAL_LM"
    json.dumps(said)


def test_any_model_with_any_loss_is_trained() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 1, 8, 8, generator=rng), torch.randint(0, 3, (16,), generator=rng)
    found = fit(
        model, [(x, y)], course=Course(30, lr=1e-2), targets=["0", "3"], rank=2,
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
    )  # fmt: skip
    assert found.losses[-1] < 0.5 * found.losses[0]
    assert set(found.adapter) == {"0", "3"}
    with torch.no_grad():
        wanted = model(x)
        found.injection.remove()
        merged = {name: torch.from_numpy(module.dense()) for name, module in found.adapter.items()}
        for name, change in merged.items():
            weight = model.get_submodule(name).weight
            weight.add_(change.reshape(weight.shape))
        np.testing.assert_allclose(model(x).numpy(), wanted.numpy(), **TRAINED_LIVE)


def test_what_cannot_be_leaves_the_model_as_it_was() -> None:
    model = models.llama()
    with pytest.raises(OptionError, match="a model cannot be sharded in a single process"):
        fit(model, batches(), rank=2, shard=True)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("LoRA" in type(module).__name__ for module in model.modules())


def test_an_interruption_takes_the_layers_out() -> None:
    model = models.llama()

    def loss(model: Any, batch: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, batches(), loss=loss, rank=2)
    assert not any("LoRA" in type(module).__name__ for module in model.modules())
    assert not any(module.training for module in model.modules())
