"""The warnings of a run that goes wrong: each is given for a run that goes wrong in this way, and for no other."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from loralens import Adapter, LowRank
from loralens.watching import HealthWarning, Watcher
from tests import models
from tests.draws import draw_basis
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
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        watcher.step(loss=loss, gradient_norm=norm)
        optimiser.zero_grad()
    return told


def codes(told: Sequence[HealthWarning]) -> list[str]:
    return [warning.code for warning in told]


def test_a_healthy_run_gives_no_warning() -> None:
    assert trained() == []


def test_a_learning_rate_that_is_far_too_high() -> None:
    told = trained(lr=3.0)
    assert "norm-explodes" in codes(told)
    assert told[0].step == 2
    assert "typical singular values of W" in told[0].text


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
    assert codes(trained(lr=1e-6, dtype=torch.bfloat16)) == ["below-rounding"]
    assert "below-rounding" not in codes(trained(lr=1e-6, dtype=torch.float32))


def watched(
    spectra: Callable[[int], Sequence[float]], modules: int = 4, sick: int = 4, snapshots: int = 10
) -> list[Any]:
    """The warnings for adapters with these singular values at each snapshot; the modules that are not sick stay."""
    told: list[HealthWarning] = []
    watcher = Watcher(on_warning=told.append)
    rng = np.random.default_rng(0)
    r = len(spectra(0))
    sides = [(draw_basis(rng, 60, r), draw_basis(rng, 50, r)) for _ in range(modules)]
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


def heard(losses: Sequence[float], norms: Sequence[float] = (), every: int = 2) -> list[int]:
    """The steps at which a run with these losses and gradient norms is said to diverge."""
    told: list[HealthWarning] = []
    watcher = Watcher(every=every, on_warning=told.append)
    adapter = Adapter(modules={"layers.0.q_proj": LowRank(np.eye(9, 4), np.eye(4, 9))})
    for step, loss in enumerate(losses, 1):
        watcher.hear(loss, norms[step - 1] if norms else None)
        if step % every == 0:
            watcher.look(step, adapter)
    return [warning.step for warning in told if warning.code == "diverges"]


def test_a_loss_that_explodes() -> None:
    sound = [4.0, 3.5, 3.0, 3.4, 2.9, 3.1, 2.8, 3.0]
    exploding = [*sound[:4], 7.0, 9.0, 12.0, 10.0]
    assert heard(sound, [1.0] * 8) == []
    # The gradient grows too: one snapshot is enough. Else two in a row are needed, since a batch may be hard.
    assert heard(exploding, [1.0] * 4 + [5.0] * 4) == [6]
    assert heard(exploding, [1.0] * 8) == heard(exploding) == [8]
    assert heard([*exploding[:6], *sound[:2]]) == []
    # A gradient alone is none.
    assert heard(sound, [1.0] * 6 + [50.0] * 2) == []
    # A snapshot so rare that it comes after the explosion still sees it.
    assert heard(exploding, [1.0] * 4 + [9.0] * 4, every=8) == [8]
    # The first batch was an easy one.
    assert heard([2.0, *sound[1:4], 3.4, 3.6, 3.5, 3.4], [1.0] * 4 + [4.0] * 4) == []
    # The loss of reinforcement learning is no likelihood, and a step without labels has none.
    assert heard([0.01, -0.02, 0.1, 0.1, 0.5, 0.9, 2.0, 3.0], [1.0, 1.0, 5.0, 5.0, 9.0, 9.0, 9.0, 9.0]) == []
    assert heard([float("nan")] * 8) == []


def test_an_update_that_grows_too_fast_for_its_weight_where_the_loss_is_not_known() -> None:
    def warned(*, loss: float | None = None, width: int = 256) -> list[tuple[str, int]]:
        """The warnings of a layer whose ‖ΔW‖ grows by 0.2 typical singular values in each of 2 steps, and then 0.3."""
        layer = nn.Sequential(nn.Linear(width, width, bias=False))
        model = peft.get_peft_model(layer, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"]))
        told: list[HealthWarning] = []
        watcher = Watcher(model, every=2, on_warning=told.append)
        B, A = (parameter for name, parameter in sorted(model.named_parameters(), reverse=True) if "lora_" in name)
        typical = float(layer[0].base_layer.weight.norm()) / width**0.5
        with torch.no_grad():
            for size in (0.2, 0.4, 0.7, 1.0):
                B.copy_(torch.eye(width, 4))
                B.mul_(size * typical / (B @ A).norm())
                watcher.step(loss=loss)
        return [(warning.code, warning.step) for warning in told]

    assert warned() == [("norm-explodes", 4)]
    assert warned(loss=1.0) == []
    assert warned(width=128) == []
