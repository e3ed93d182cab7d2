"""Models that `torch.compile` has wrapped: their layers have the names of the model inside."""

from typing import Any

import pytest

from loralens.training import inject
from tests import models

torch = pytest.importorskip("torch")
# torch's own, while it traces a block.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


def compiled(module: Any) -> Any:
    """Traced by torch, and run as it is: to generate code takes seconds."""
    return torch.compile(module, backend="eager")


def whole(model: Any) -> Any:
    return compiled(model)


def blocks(model: Any) -> Any:
    for number, block in enumerate(model.model.layers):
        model.model.layers[number] = compiled(block)
    return model


@pytest.mark.parametrize("wrapped", [whole, blocks])
def test_names_and_first_factors_are_those_of_the_model_inside(wrapped: Any) -> None:
    plain, made = (inject(model, rank=2, heads="lm_head") for model in (models.llama(), wrapped(models.llama())))
    assert list(made.layers) == list(plain.layers)
    assert list(made.heads) == list(plain.heads) == ["lm_head"]
    assert made.digests == plain.digests
