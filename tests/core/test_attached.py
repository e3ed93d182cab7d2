"""Attachment beside PEFT itself: the same outputs from a base with our hooks, and the base untouched afterwards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens import Adapter, LowRank, MismatchError
from loralens.core import Attachment, Extra, Layout, LazyArray
from tests.marks import when_used
from tests.models import low_rank
from tests.tolerances import ATTACHED, ATTACHED_16, MOVED

torch = pytest.importorskip("torch")
when_used("peft")
live = pytest.importorskip("tests.formats.test_peft_live")
nn = torch.nn

pytestmark = [
    pytest.mark.usefixtures("quiet_torch"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 3 LoRA tensor.s. have invalid shape"),  # biases on B
]

LEFT_OUT = {"tokens": {"tokens"}}
TWICE = {"attention"}  # PEFT adds out_proj's update twice
# The weight itself is changed: experts, fused attention.
CHANGED = {"attention", "mixtral", "mixtral-v4", "qwen3-moe"}


def read(case: Any, folder: Path) -> tuple[Any, Adapter]:
    """A PEFT model of a case, and the adapter as loralens reads it from what PEFT saved."""
    model = live.adapt(case)
    model.save_pretrained(folder)
    return model, loralens.load(folder)


@pytest.mark.some(5)
@pytest.mark.parametrize("case", [case for case in live.CASES if case.name not in TWICE], ids=str)
def test_outputs_are_those_of_peft(case: Any, tmp_path: Path) -> None:
    model, adapter = read(case, tmp_path)
    base = live.base(case).double()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    plain = live.answer(base, case)
    attachment = Attachment(base, adapter)
    assert {adapter.extra[key].role for key in attachment.left_out} == LEFT_OUT.get(case.name, set())
    with torch.no_grad(), attachment.on():
        found = base(case.input())
    found = found.logits if hasattr(found, "logits") else found
    assert float((found - plain).abs().max()) > MOVED
    if not attachment.left_out:
        torch.testing.assert_close(found, live.answer(model, case), **ATTACHED)
    assert set(attachment.changed) | set(attachment.hooked) == set(adapter)
    assert bool(attachment.changed) == (case.name in CHANGED or "expert" in case.name)
    assert set(attachment.hooked) == attachment.ran
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    torch.testing.assert_close(live.answer(base, case), plain, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_rounds_the_sum_once(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    model = nn.Sequential(nn.Linear(12, 10)).to(dtype)
    module = low_rank(10, 12)
    x = torch.from_numpy(rng.standard_normal((5, 12))).to(dtype)
    with torch.no_grad(), Attachment(model, Adapter(modules={"0": module})).on():
        found = model(x)
    exact = model(x).double() + x.double() @ torch.from_numpy(module.dense()).T
    assert found.dtype == dtype
    torch.testing.assert_close(found, exact.to(dtype), **ATTACHED_16)


def test_a_scaled_embedding_scales_the_update() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids: Any) -> Any:
            return super().forward(ids) * self.embed_scale

    model = nn.ModuleDict({"words": Scaled(9, 4)}).double()
    module = low_rank(4, 9, scale=-2.0, dtype=float)
    ids = torch.tensor([[1, 8, 8]])
    plain = model["words"](ids)
    with Attachment(model, Adapter(modules={"words": module})).on():
        found = model["words"](ids)
    torch.testing.assert_close(found - plain, 3.0 * torch.from_numpy(module.dense().T)[ids], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "B", "A"), [(nn.Linear(6, 5), (6, 2), (2, 5)), (nn.Embedding(9, 4), (9, 2), (2, 4))], ids=str
)
def test_an_update_that_lies_the_other_way_is_refused(layer: Any, B: Any, A: Any) -> None:
    with pytest.raises(MismatchError, match="layer: its update has the shape"):
        Attachment(nn.ModuleDict({"layer": layer}), Adapter(modules={"layer": LowRank(np.ones(B), np.ones(A))}))


def test_a_trained_bias_and_a_magnitude_of_one_layer_and_differences() -> None:
    rng = np.random.default_rng(4)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    module = low_rank(5, 6, dtype=float)
    m, b, D, d = (rng.standard_normal(shape) for shape in (5, 5, (4, 5), 4))
    extra = {
        "m": Extra("magnitude", "0", LazyArray.of(m.reshape(5, 1))),
        "b": Extra("bias", "0", LazyArray.of(b), "bias"),
        "D": Extra("diff", "1", LazyArray.of(D)),
        "d": Extra("diff_b", "1", LazyArray.of(d), "bias"),
        "in": Extra("magnitude_in", "0", LazyArray.of(np.ones(6))),
        "short": Extra("bias", "1", LazyArray.of(np.ones(3)), "bias"),
        "far": Extra("magnitude", "1", LazyArray.of(np.ones(4))),
    }
    attachment = Attachment(model, Adapter(modules={"0": module}, extra=extra))
    assert set(attachment.left_out) == {"in", "short", "far"}
    x = rng.standard_normal((3, 6))
    with torch.no_grad(), attachment.on():
        found = model(torch.from_numpy(x)).numpy()
    (W0, _), (W1, b1) = ((layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in model)
    V = W0 + module.dense()
    V *= (m / np.linalg.norm(V, axis=1))[:, None]
    np.testing.assert_allclose(found, (x @ V.T + b) @ (W1 + D).T + b1 + d, rtol=1e-10)


@pytest.mark.parametrize("turned", [False, True])
def test_a_stack_of_an_adapter_on_experts_that_the_model_holds_alone(turned):
    f, d = 3, 4
    experts = [nn.ModuleDict({"w1": nn.Linear(d, f, bias=False), "w3": nn.Linear(d, f, bias=False)}) for _ in range(2)]
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.ModuleList(experts)})})
    shape = (d, 2 * f) if turned else (2 * f, d)
    modules = {
        f"mlp.experts.gate_up_proj[{e}]": low_rank(*shape, seed=e, dtype=float, layout=Layout("experts"))
        for e in range(2)
    }
    attachment = Attachment(model, loralens.Adapter(modules=modules))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with attachment.on():
        for e in range(2):
            D = modules[f"mlp.experts.gate_up_proj[{e}]"].dense()
            halves = np.split(D.T if turned else D, 2)
            for part, half in zip(("w1", "w3"), halves, strict=True):
                key = f"mlp.experts.{e}.{part}.weight"
                torch.testing.assert_close(
                    model.state_dict()[key], before[key] + torch.tensor(half, dtype=torch.float32)
                )
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0)
