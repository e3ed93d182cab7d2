"""The warnings of a run that goes wrong: each is given for a run that goes wrong in this way, and for no other."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from loralens import Adapter, LowRank
from loralens.watching import HealthWarning, Watcher
from tests import models
from tests.marks import when_used

peft = when_used("peft")


def trained(
    *, lr: float = 1e-2, only: str = "lora_", dtype: Any = torch.float32, steps: int = 16
) -> list[HealthWarning]:
    """The warnings of a run of a tiny Llama that learns to repeat."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(
            models.llama().to(dtype), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
        )
    told: list[HealthWarning] = []
    watcher = Watcher(model, every=2, on_warning=told.append)
    optimiser = torch.optim.AdamW([p for name, p in model.named_parameters() if only in name], lr=lr)
    draws = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(3, 24, (4, 8), generator=draws).repeat(1, 2)
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        watcher.step()
        optimiser.zero_grad()
    return told


def codes(told: Sequence[HealthWarning]) -> list[str]:
    return [warning.code for warning in told]


def test_a_healthy_run_gives_no_warning() -> None:
    assert trained() == []


def test_a_learning_rate_that_is_far_too_high() -> None:
    told = trained(lr=3.0)
    assert "norm-explodes" in codes(told)
    assert "times ‖W‖" in told[0].text


def test_a_factor_that_is_not_trained() -> None:
    assert codes(trained(only="lora_B")) == ["A-still"]
    assert codes(trained(only="lora_A")) == ["zero-update"]


def test_a_frozen_A_is_meant() -> None:
    model = peft.get_peft_model(models.llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    told: list[HealthWarning] = []
    watcher = Watcher(model, on_warning=told.append)
    for step in range(1, 8):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.003 * torch.randn(parameter.shape) / step)
        watcher.step()
    assert told == []


def test_an_update_below_the_rounding_of_the_base() -> None:
    # Factors of 16 bits do not move at this rate either.
    assert codes(trained(lr=1e-6, dtype=torch.bfloat16)) == ["below-rounding", "A-still"]
    assert "below-rounding" not in codes(trained(lr=1e-6, dtype=torch.float32))


def watched(
    spectra: Callable[[int], Sequence[float]], modules: int = 4, sick: int = 4, snapshots: int = 10
) -> list[Any]:
    """The warnings for adapters with these singular values at each snapshot; the modules that are not sick stay."""
    told: list[HealthWarning] = []
    watcher = Watcher(on_warning=told.append)
    rng = np.random.default_rng(0)
    r = len(spectra(0))
    sides = [
        (np.linalg.qr(rng.standard_normal((60, r)))[0], np.linalg.qr(rng.standard_normal((50, r)))[0])
        for _ in range(modules)
    ]
    for snapshot in range(1, snapshots + 1):
        pairs = {
            f"layers.{i}.q_proj": LowRank(
                U * np.asarray(spectra(snapshot if i < sick else 0)), V.T * (1 + 0.01 * snapshot)
            )
            for i, (U, V) in enumerate(sides)
        }
        watcher.look(10 * snapshot, Adapter(modules=pairs))
    return [(warning.code, warning.step, len(warning.modules)) for warning in told]


GOOD = np.geomspace(1, 0.1, 16)


def spiky(snapshot: int) -> Sequence[float]:
    return [*[20.0 if snapshot >= 6 else 1.0], *GOOD[1:]]


def test_warnings_of_shape_come_with_the_second_snapshot_that_shows_them_and_once() -> None:
    assert watched(lambda _: GOOD) == []
    assert watched(lambda _: np.ones(16)) == [("rank-saturated", 50, 4)]
    # A rank that is not used is a note about the finished adapter: the run goes well.
    assert watched(lambda _: [1, 0.5, *[1e-3] * 14]) == []
    assert ("spike", 70, 4) in watched(spiky)
    assert ("collapse", 70, 4) in watched(spiky)
    # In fewer than half of the modules they are no warning.
    assert watched(spiky, sick=1) == []
    assert {step for _, step, _ in watched(spiky, sick=2)} == {70}
    # One snapshot may catch a moment.
    assert watched(lambda snapshot: spiky(6) if snapshot == 6 else GOOD) == []


def test_growth_beyond_the_square_of_the_steps() -> None:
    told = watched(lambda snapshot: GOOD * (1000.0 if snapshot >= 6 else snapshot**2))
    assert told == [("norm-explodes", 60, 4)]
