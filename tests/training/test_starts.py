"""The starts that are made of a weight or of a gradient, and those that an adapter brings."""

import copy
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

import loralens
from loralens import MismatchError, OptionError
from loralens.choices import ScaleRule, StartName
from loralens.core import Attachment
from loralens.training import Course, fit, inject, read_injection, record_of
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


# ---- A of an adapter


def trained(rank: int = 2, **options: Any) -> Any:
    made = inject(models.llama(), targets=["q_proj", "embed_tokens"], rank=rank, seed=5, **options)
    with torch.no_grad():
        for layer in made.layers.values():
            layer.A.add_(0.1)
            layer.B.add_(0.2)
    return read_injection(made)


def test_a_run_starts_with_the_a_of_an_adapter_and_with_b_of_0() -> None:
    adapter = trained()
    made = fit(
        models.llama(), BATCHES, course=Course(1, lr=1e-12), targets=["q_proj", "embed_tokens"], rank=2,
        first_a=adapter, freeze_a=True,
    )  # fmt: skip
    for name, layer in made.injection.layers.items():
        drawn, other = ("B", "A") if layer.kind == "embedding" else ("A", "B")
        np.testing.assert_array_equal(getattr(layer, drawn).detach().numpy(), getattr(adapter[name], drawn))
        assert not getattr(layer, drawn).requires_grad
        assert getattr(layer, other).abs().max() < 1e-10
    record = record_of(made.adapter) or {}
    assert (record["initialisation"], record["method"]) == ("A of an adapter", "frozen-a")


@pytest.mark.parametrize(
    ("options", "words", "error"),
    [
        ({"rank": 3}, r"q_proj has \(2, 16\), where the model needs \(3, 16\)", MismatchError),
        ({"targets": "v_proj"}, "has no pair for model.layers.0.self_attn.v_proj", MismatchError),
        ({"method": "pissa"}, "pissa starts with factors of its own", OptionError),
    ],
)
def test_an_a_that_does_not_fit_is_refused(options: dict[str, Any], words: str, error: Any) -> None:
    model = models.llama()
    modules = dict(model.named_modules())
    with pytest.raises(error, match=words):
        fit(model, BATCHES, course=Course(1), first_a=trained(), **{"targets": "q_proj", "rank": 2, **options})
    assert dict(model.named_modules()) == modules


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
