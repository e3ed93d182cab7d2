"""LoRA layers beside PEFT's, the dense parametrisation, and finite differences."""

import copy
from typing import Any

import numpy as np
import pytest

from loralens.training import inject
from tests.tolerances import ATTACHED
from tests.training.conftest import KINDS, Holder, holder, injected, peft_beside, randomise

torch = pytest.importorskip("torch")
nn = torch.nn

NAME = "net.layer"
METHODS = ("lora", "rslora", "lora+", "dora", "frozen-a")

pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to False:UserWarning")


def close(found: Any, wanted: Any, tolerance: Any = ATTACHED) -> None:
    np.testing.assert_allclose(found.detach().double().numpy(), wanted.detach().double().numpy(), **tolerance)


def dense(made: Any, kind: str, x: Any) -> nn.Module:
    """The same layer with its whole weight W + ΔW, DoRA's rows rescaled: differentiable in B, A and m."""
    layer = made.layers[NAME]
    W, B, A = layer.matrix(layer.base_layer), layer.B, layer.A
    V = W + layer.scale * B @ A
    if layer.A0 is not None:
        V = V - layer.scale * layer.B0 @ layer.A0
    if layer.magnitude is not None:
        V = V * (layer.magnitude / V.detach().norm(dim=1))[:, None]
    whole = V.T if kind in ("Conv1D", "embedding") else V
    return torch.func.functional_call(layer.base_layer, {"weight": whole.reshape(layer.weight.shape)}, x)


def unpadded(kind: str) -> Any:
    """The input, without the padding token: torch gives a weight no gradient from it, and PEFT (as we) only A none."""
    x = KINDS[kind][1]()
    return x.requires_grad_() if x.is_floating_point() else x.clamp(min=1)


@pytest.mark.parametrize("method", [*METHODS, "pissa"])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_the_whole_weight(kind: str, method: str) -> None:
    made, x = injected(kind, method=method), unpadded(kind)
    ours, wanted = made.model(x), dense(made, kind, x)
    close(ours, wanted)
    assert (ours - holder(kind)(x)).abs().max() > 0.1  # or both would do nothing
    output = torch.randn_like(ours)
    inputs = [p for p in (*made.layers[NAME].parameters(recurse=False), x) if p.requires_grad]
    pairs = zip(torch.autograd.grad(ours, inputs, output), torch.autograd.grad(wanted, inputs, output), strict=True)
    for mine, other in pairs:
        close(mine, other)


@pytest.mark.parametrize("method", ["lora", "rslora", "lora+", "frozen-a"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_unchanged_at_the_start(kind: str, method: str) -> None:
    made, x = injected(kind, method=method, random=False), KINDS[kind][1]()
    assert torch.equal(made.model(x), holder(kind)(x))


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["linear", "linear-no-bias", "Conv1D", "conv2d", "embedding"])
def test_dropout_is_pefts_and_in_training_only(kind: str, method: str) -> None:
    made = injected(kind, method=method, dropout=0.5)
    theirs = peft_beside(made, holder(kind), lora_dropout=0.5)
    x = KINDS[kind][1]()
    outputs = []
    for training in (True, False):
        for model in (made.model, theirs):
            model.train(training)
            torch.manual_seed(11)
            outputs.append(model(x))
    close(outputs[0], outputs[1])
    close(outputs[2], outputs[3])
    torch.manual_seed(12)
    assert torch.equal(made.model(x), outputs[2])
    assert torch.equal(outputs[0], outputs[2]) == (kind == "embedding")


@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d", "embedding"])
def test_a_16_bit_base_has_float32_factors_and_rounds_once(kind: str, method: str) -> None:
    made = injected(kind, method=method, dtype=torch.bfloat16)
    layer = made.layers[NAME]
    assert {p.dtype for p in layer.parameters(recurse=False)} == {torch.float32}
    assert layer.base_layer.weight.dtype == torch.bfloat16
    x = KINDS[kind][1]()
    x = x.bfloat16() if x.is_floating_point() else x
    y = made.model(x)
    assert y.dtype == torch.bfloat16
    wide = copy.deepcopy(made.model).double()
    close(y, wide(x.double() if x.is_floating_point() else x), {"rtol": 2.0**-6, "atol": 2.0**-6})
    y.float().square().sum().backward()
    assert layer.A.grad.dtype == torch.float32


def test_a_scaled_embedding_scales_its_update() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, input: Any) -> Any:
            return super().forward(input) * self.embed_scale

    made = inject(Holder(Scaled(9, 5).double()), targets="layer", rank=2)
    randomise(made)
    layer = made.layers[NAME]
    W = layer.weight + (layer.scale * layer.B @ layer.A).T
    close(made.model(torch.arange(9)), 3 * W)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding": "same", "padding_mode": "circular"}])
def test_convolutions_of_every_geometry_are_those_of_the_whole_weight(options: Any) -> None:
    made = inject(Holder(nn.Conv2d(4, 5, 3, **options).double()), targets="layer", rank=2)
    randomise(made)
    layer, x = made.layers[NAME], KINDS["conv2d"][1]()
    whole = layer.weight + layer.scale * (layer.B @ layer.A).view(layer.weight.shape)
    close(made.model(x), torch.func.functional_call(layer.base_layer, {"weight": whole}, x))


def test_a_row_of_zeros_has_no_direction_and_no_nan() -> None:
    model = holder("linear")
    model.net.layer.weight.data[1] = 0
    made = inject(model, method="dora", rank=2)
    x = KINDS["linear"][1]()
    made.model(x).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.model.parameters())
