"""The starts that are made of a weight or of a gradient, and those that an adapter brings."""

import copy
from pathlib import Path
from typing import Any, get_args

import pytest

import loralens
from loralens import OptionError
from loralens.choices import ScaleRule, StartName
from loralens.core import Attachment
from loralens.training import Course, fit, record_of
from loralens.training.initialisation import GAMMA, gradient_pair
from tests import models

torch = pytest.importorskip("torch")

IDS = torch.tensor([[3, 4, 5, 9, 2], [7, 7, 3, 1, 6]])
BATCHES = [{"input_ids": IDS, "labels": IDS}, {"input_ids": IDS.flip(0, 1), "labels": IDS.flip(0, 1)}]


def numbers(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_lora_ga_has_the_directions_and_the_lengths_of_the_paper() -> None:
    W, G = numbers(12, 9), numbers(12, 9, seed=1)
    U, _, Vh = torch.linalg.svd(G)
    B, A = gradient_pair("m", W, G, rank=3)
    length = 12**0.25 / GAMMA**0.5
    for row, direction in zip(A, Vh[:3], strict=True):
        torch.testing.assert_close(abs(row @ direction), torch.tensor(length, dtype=torch.float64))
        torch.testing.assert_close(row.norm(), torch.tensor(length, dtype=torch.float64))
    for column, direction in zip(B.T, U.T[3:6], strict=True):
        torch.testing.assert_close(abs(column @ direction), torch.tensor(length, dtype=torch.float64))
    # The size of the gradient does not matter.
    torch.testing.assert_close(gradient_pair("m", W, 1e-6 * G, rank=3).A, A)
    # A matrix that has fewer than 2r directions.
    B, A = gradient_pair("m", numbers(12, 4), G[:, :4], rank=3)
    assert (B.shape, A.shape) == ((12, 3), (3, 4))
    torch.testing.assert_close(B.T @ B, length**2 * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("gradient", "words"),
    [
        (torch.zeros(4, 3), "the gradient of the first step is 0"),
        (torch.full((4, 3), float("nan")), "the gradient of the first step is not finite"),
        (torch.ones(3, 4), r"the gradient has the shape \(3, 4\), where the weight has \(4, 3\)"),
    ],
)
def test_a_gradient_without_directions_is_refused(gradient: Any, words: str) -> None:
    with pytest.raises(OptionError, match=f"^m: {words}"):
        gradient_pair("m", torch.ones(4, 3), gradient, rank=1)


def test_fit_starts_along_the_gradient_of_its_first_step() -> None:
    model = models.llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    both = torch.autograd.grad(sum(model(**batch).loss for batch in BATCHES), weight)[0]
    first = torch.autograd.grad(model(**BATCHES[0]).loss, weight)[0]
    for accumulate, gradient in ((2, both), (1, first)):
        made = fit(
            copy.deepcopy(model), BATCHES, course=Course(1, lr=1e-9, accumulate=accumulate), targets="up_proj", rank=2,
            method="lora-ga",
        )  # fmt: skip
        layer = made.injection.layers["model.layers.0.mlp.up_proj"]
        wanted = gradient_pair("m", weight, gradient, rank=2)
        torch.testing.assert_close(layer.A0, wanted.A, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.B0, wanted.B, rtol=1e-4, atol=1e-5)
        assert (record_of(made.adapter) or {})["initialisation"] == "lora-ga"


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
