"""Every start under every scale rule beside PEFT, where PEFT has it: the same factors, or the same function."""

import copy
from typing import Any

import pytest

from loralens.training import Injection, inject
from tests import models
from tests.marks import when_used

torch = pytest.importorskip("torch")
peft = when_used("peft")

# PEFT counts backward passes by a hook that torch warns of where only weights need gradients.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

RANK, ALPHA = 3, 5.0
KIND = "up_proj"
IDS = torch.tensor([[3, 4, 5, 9, 2], [7, 7, 3, 1, 6]])
RULES = ("lora", "rslora")
# Our start → PEFT's ``init_lora_weights``.
STARTS = {"kaiming": True, "gaussian": "gaussian", "pissa": "pissa", "olora": "olora", "lora-ga": "lora_ga"}


def theirs(start: str, rule: str) -> Any:
    """A model of PEFT with this start."""
    model = models.llama()
    more: dict[str, Any] = {}
    if start == "lora-ga":
        from peft import LoraGAConfig

        more["lora_ga_config"] = LoraGAConfig()
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[KIND],
        use_rslora=rule == "rslora",
        init_lora_weights=STARTS[start],
        **more,
    )
    if start == "lora-ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(model, config)


def ours(start: Any, rule: Any) -> Injection:
    model = models.llama()

    def gradients(weights: Any) -> Any:
        with torch.enable_grad():
            loss = model(input_ids=IDS, labels=IDS).loss
            return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))

    return inject(model, targets=KIND, rank=RANK, alpha=ALPHA, start=start, scale_rule=rule, gradients=gradients)


def pairs(start: str, rule: str) -> list[tuple[Any, Any, Any]]:
    """Our layer, PEFT's layer, and the weight of the base, for every module."""
    mine, other, base = ours(start, rule), theirs(start, rule), models.llama()
    return [
        (layer, other.get_submodule(f"base_model.model.{name}"), base.get_submodule(name).weight.detach())
        for name, layer in mine.layers.items()
    ]


def factors(layer: Any) -> tuple[Any, Any]:
    return layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.some(2)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("start", STARTS)
def test_the_scale_is_pefts_and_the_model_starts_as_it_is_in_both(start: str, rule: str) -> None:
    with torch.no_grad():
        wanted = models.llama()(input_ids=IDS).logits
        close(ours(start, rule).model(input_ids=IDS).logits, wanted)
        close(theirs(start, rule)(input_ids=IDS).logits, wanted)
    for layer, other, _ in pairs(start, rule):
        assert layer.scale == pytest.approx(other.scaling["default"], rel=1e-12)
        B, A = factors(other)
        assert (layer.B.shape, layer.A.shape) == (B.shape, A.shape)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_is_made_of_the_weight_is_what_peft_makes(start: str, rule: str) -> None:
    """PEFT keeps the rest of W in the base, and we subtract the start."""
    for layer, other, W in pairs(start, rule):
        B, A = factors(other)
        if start == "olora":  # the same factors; an SVD leaves the signs open
            close(layer.B, B)
            close(layer.A, A)
        close(layer.B @ layer.A, B @ A)
        close(abs(layer.B), abs(B))
        close(W - layer.scale * layer.B0 @ layer.A0, other.base_layer.weight.detach())


@pytest.mark.parametrize("rule", RULES)
def test_the_start_along_the_gradient_has_pefts_directions(rule: str) -> None:
    """PEFT multiplies B by the singular values of the gradient and by a constant, and leaves A at length 1."""
    for layer, other, _ in pairs("lora-ga", rule):
        B, A = factors(other)
        length = layer.B.shape[0] ** 0.25 / 16**0.5
        close(abs(layer.A), length * abs(A))
        close(abs(layer.B), length * abs(B / B.norm(dim=0)))


@pytest.mark.parametrize("start", ["kaiming", "gaussian"])
def test_what_is_drawn_has_the_distribution_of_pefts(start: Any) -> None:
    layer = torch.nn.Linear(600, 40)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = copy.deepcopy(layer)

    mine = inject(Net(), targets="layer", rank=20, alpha=8, start=start).layers["layer"]
    config = peft.LoraConfig(r=20, lora_alpha=8, target_modules=["layer"], init_lora_weights=STARTS[start])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        B, A = factors(peft.get_peft_model(Net(), config).base_model.model.layer)
    assert not mine.B.any()
    assert not B.any()
    # 12,000 numbers: the standard error of a standard deviation is 0.6 %.
    drawn = mine.A.detach()
    assert float(drawn.std()) == pytest.approx(float(A.std()), rel=0.03)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.03 * float(A.std()))
    if start == "kaiming":
        assert float(drawn.abs().max()) == pytest.approx(float(A.abs().max()), rel=1e-2)
