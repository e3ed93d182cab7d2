"""Models that `torch.compile` has wrapped: their layers have the names of the model inside."""

import copy
from typing import Any

import pytest

from loralens.errors import OptionError
from loralens.training.injection import inject
from tests import models

torch = pytest.importorskip("torch")
nn = torch.nn
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


def test_a_layer_that_is_compiled_by_itself_is_refused() -> None:
    """The wrapper holds the code of the layer, so that a layer inside it would never be called."""
    model = nn.Sequential(compiled(nn.Linear(3, 3)), nn.Linear(3, 3))
    before = copy.copy(model._modules)
    with pytest.raises(OptionError, match=r"^0 is compiled by itself"):
        inject(model, targets=["0", "1"], rank=2)
    assert model._modules == before
    assert list(inject(model, targets="1", rank=2).layers) == ["1"]
