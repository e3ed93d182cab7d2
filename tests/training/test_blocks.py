"""The blocks of a model, and activations that are computed again."""

import copy
from typing import Any

import pytest

from loralens.training import inject
from loralens.training.world import recompute_blocks, repeated_blocks
from tests import models
from tests.training.test_ranks import mixture

torch = pytest.importorskip("torch")

IDS = torch.randint(2, 24, (3, 12), generator=torch.Generator().manual_seed(0))


def test_the_blocks_of_a_hybrid_model_are_its_largest_list() -> None:
    jamba = mixture("jamba")
    layers = list(jamba.model.layers)
    assert len({type(layer) for layer in layers}) == 2  # one with attention, one with a state space
    assert repeated_blocks(jamba) == layers


def gradients(model: Any, *, on: bool, dropout: float = 0.0) -> tuple[dict[str, Any], int]:
    """The gradients of the factors, and the bytes that were saved for the backward pass."""
    made = inject(copy.deepcopy(model), targets="*_proj", rank=2, dropout=dropout)
    with torch.no_grad():
        for layer in made.layers.values():
            layer.B.add_(0.1)
    made.model.train()
    saved: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in made.model.parameters()}
    torch.manual_seed(5)
    with recompute_blocks(made.model, on=on):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = made.model(input_ids=IDS, labels=IDS).loss
        loss.backward()
    found = {name: layer.B.grad for name, layer in made.layers.items()}
    return found, sum(size for where, size in saved.items() if where not in weights)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_the_same_and_less_is_saved(dropout: float) -> None:
    model = models.llama().double()  # with its cache of keys and values on, as transformers has it
    plain, kept = gradients(model, on=False, dropout=dropout)
    again, less = gradients(model, on=True, dropout=dropout)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert less < kept / 2
    if dropout:
        assert not torch.equal(
            gradients(model, on=True)[0]["model.layers.0.mlp.up_proj"], plain["model.layers.0.mlp.up_proj"]
        )
