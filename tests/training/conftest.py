"""One layer of every kind that can be adapted, an input for it, and PEFT beside us on the same weights."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest

from loralens.training import Injection, inject

torch = pytest.importorskip("torch")
nn = torch.nn


class Holder(nn.Module):
    """A model of one layer, called ``net.layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.net = nn.Module()
        self.net.layer = layer

    def forward(self, x: Any) -> Any:
        return self.net.layer(x)


def conv1d(inside: int, outside: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(outside, inside)


def numbers(*shape: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


# name → the layer, the input, the class of the frozen layer's kind
KINDS = {
    "linear": (lambda: nn.Linear(6, 5), lambda: numbers(2, 3, 6)),
    "linear-no-bias": (lambda: nn.Linear(6, 5, bias=False), lambda: numbers(4, 6)),
    "Conv1D": (lambda: conv1d(6, 5), lambda: numbers(2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 5, 3, padding=1), lambda: numbers(2, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 5, (3, 2), stride=2), lambda: numbers(2, 4, 8, 7)),
    "conv2d-1x1": (lambda: nn.Conv2d(4, 5, 1, bias=False), lambda: numbers(2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 5, 2, padding=1), lambda: numbers(1, 4, 3, 4, 3)),
    "embedding": (lambda: nn.Embedding(9, 5, padding_idx=0), lambda: torch.tensor([[0, 3, 8], [3, 3, 1]])),
}


def holder(kind: str, *, dtype: Any = torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Holder(KINDS[kind][0]()).to(dtype)


def injected(kind: str, *, dtype: Any = torch.float64, random: bool = True, **options: Any) -> Injection:
    """Our layers in a model of one, every factor filled with random numbers."""
    made = inject(holder(kind, dtype=dtype), targets="layer", rank=3, alpha=5.0, gradients=random_gradients, **options)
    if random:
        randomise(made)
    return made


def random_gradients(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Gradients of any size for the start along them, which asks for no others."""
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(weight.shape, generator=generator).double() for name, weight in weights.items()}


@torch.no_grad()
def randomise(made: Injection, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in made.layers.values():
        for factor in (layer.B, layer.A):
            factor.copy_(torch.randn(factor.shape, generator=generator, dtype=torch.float64) / 2)
        if layer.magnitude is not None:
            layer.magnitude.mul_(1 + torch.rand(layer.magnitude.shape, generator=generator, dtype=torch.float64))


@torch.no_grad()
def peft_beside(made: Injection, model: nn.Module, **options: Any) -> nn.Module:
    """PEFT on a base of the same weights, with our factors copied in."""
    import peft

    rslora, dora = made.method.formula == "alpha/sqrt(r)", made.method.magnitude
    config = peft.LoraConfig(
        r=made.rank,
        lora_alpha=made.alpha,
        target_modules=list(made.layers),
        use_rslora=rslora,
        use_dora=dora,
        **options,
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config)  # factors in float32 beside 16 bits, as ours are
    for name, layer in made.layers.items():
        own = theirs.get_submodule(f"base_model.model.{name}")
        if layer.kind == "embedding":
            own.lora_embedding_A["default"].copy_(layer.A)
            own.lora_embedding_B["default"].copy_(layer.B)
        else:
            A, B = own.lora_A["default"].weight, own.lora_B["default"].weight
            A.copy_(layer.A.view(A.shape))
            B.copy_(layer.B.view(B.shape))
        if layer.magnitude is not None:
            m = own.lora_magnitude_vector["default"].weight
            m.copy_(layer.magnitude.view(m.shape))
    return theirs


@pytest.fixture(autouse=True)
def alone(one_thread: None) -> None:
    """Every test of this folder."""
