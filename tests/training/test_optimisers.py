"""The optimisers of a run."""

from typing import Any

import pytest

from loralens.training import Course, inject
from loralens.training.course import Together, make_optimiser
from tests import models

torch = pytest.importorskip("torch")
CPU = torch.device("cpu")


def groups(**options: Any) -> list[dict[str, Any]]:
    made = inject(models.llama(), targets="q_proj", rank=2, **options)
    return made.groups(lr=1e-3)


def test_adamw_has_the_options_of_the_course() -> None:
    made = make_optimiser(groups(), Course(1, beta1=0.5, beta2=0.6, epsilon=1e-3, weight_decay=0.1), device=CPU)
    assert type(made) is torch.optim.AdamW
    assert (made.defaults["betas"], made.defaults["eps"], made.defaults["weight_decay"]) == ((0.5, 0.6), 1e-3, 0.1)
    assert made.defaults["fused"] is None  # on a CPU the numbers stay those of the plain loop


def test_muon_takes_the_factors_and_adamw_everything_else() -> None:
    made = make_optimiser(groups(method="dora", heads=["lm_head"]), Course(1, optimiser="muon"), device=CPU)
    assert isinstance(made, Together)
    muon, adamw = made.optimisers
    assert type(muon) is torch.optim.Muon
    assert [group["name"] for group in muon.param_groups] == ["A", "B"]
    assert type(adamw) is torch.optim.AdamW
    assert [group["name"] for group in adamw.param_groups] == ["magnitude", "heads"]
    assert type(make_optimiser(groups(), Course(1, optimiser="muon"), device=CPU)) is torch.optim.Muon


def test_together_takes_the_steps_of_both() -> None:
    first, second = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    alone = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    make = (lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW([p], lr=0.2))
    both = Together([make[0](first), make[1](second)])
    single = [make[i](alone[i]) for i in range(2)]
    for step in range(3):
        for parameter in (first, second, *alone):
            parameter.grad = torch.full((2, 2), step + 1.0)
        both.step()
        for one in single:
            one.step()
    assert torch.equal(first, alone[0])
    assert torch.equal(second, alone[1])
