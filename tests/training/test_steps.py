"""Training itself, beside PEFT from the same factors: the same losses step for step."""

import copy
from typing import Any

import numpy as np
import pytest

from loralens.training.injection import inject
from tests import models
from tests.marks import slow_except, when_used
from tests.tolerances import TRAINED_LOSS
from tests.training.conftest import peft_beside

torch = pytest.importorskip("torch")
when_used("peft")


def losses(model: Any, optimiser: Any) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(20):
        ids = torch.randint(2, 24, (4, 9), generator=generator)
        optimiser.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    return found


@pytest.mark.some(1)
@pytest.mark.parametrize("method", slow_except(["lora", "rslora", "lora+", "dora", "frozen-a"], "lora", "lora+"))
def test_losses_are_pefts_step_for_step(method: str) -> None:
    model = models.llama().double().train()
    made = inject(copy.deepcopy(model), targets="*_proj", rank=4, method=method)
    theirs = peft_beside(made, model)
    groups: dict[str, list[Any]] = {"lora_A": [], "lora_B": [], "magnitude": []}
    for name, parameter in theirs.named_parameters():
        part = next((part for part in groups if part in name), None)
        if part is None or (method == "frozen-a" and part == "lora_A"):
            parameter.requires_grad_(False)
        else:
            groups[part].append(parameter)
    rates = {"lora_B": 16e-2 if method == "lora+" else 1e-2}
    other = [{"params": params, "lr": rates.get(part, 1e-2)} for part, params in groups.items() if params]
    ours = losses(made.model, torch.optim.SGD(made.groups(lr=1e-2), momentum=0.9))
    wanted = losses(theirs, torch.optim.SGD([g for g in other if g["params"][0].requires_grad], momentum=0.9))
    np.testing.assert_allclose(ours, wanted, rtol=TRAINED_LOSS)
    assert abs(ours[-1] - ours[0]) > 1e-3
