"""Frozen weights that are codes: those of bitsandbytes are adapted (QLoRA), and others are named."""

import copy
from pathlib import Path
from typing import Any

import pytest

import loralens
from loralens.errors import OptionError
from loralens.training import Course, fit, record_of
from loralens.training.injection import inject
from loralens.training.layers.quantised import QuantisedLayer, codes_of
from loralens.training.readout import read_injection
from tests import models
from tests.training.conftest import randomise

torch = pytest.importorskip("torch")
nn = torch.nn

IDS = torch.randint(3, 20, (2, 9), generator=torch.Generator().manual_seed(0))
KINDS = ("nf4", "fp4", "int8")


def quantised(kind: str) -> Any:
    """A model whose linear layers are layers of bitsandbytes."""
    bnb = pytest.importorskip("bitsandbytes")
    model = models.wide_llama()
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and name != "lm_head":
                setattr(module, name, _coded(bnb, layer, kind).to("cpu"))
    return model.eval()


def _coded(bnb: Any, layer: Any, kind: str) -> Any:
    size = (layer.in_features, layer.out_features)
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(layer.weight.data.half())
        new.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
        return new
    new = bnb.nn.Linear4bit(*size, bias=False, quant_type=kind, compute_dtype=torch.float32)
    new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type=kind)
    return new


class Packed(nn.Module):
    """A linear layer as libraries of quantised models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, 2, dtype=torch.int32))


class PackedLinear(Packed):
    """Its class, by whose name it is recognised."""


def test_codes_that_cannot_be_adapted_are_named() -> None:
    with pytest.raises(OptionError, match=r"the weights of the linear layers are codes \(PackedLinear\)") as refused:
        inject(nn.Sequential(PackedLinear()), rank=2)
    assert "load the model in 16 or 32 bits, or in NF4 or int8 by bitsandbytes" in refused.value.fix


@pytest.mark.live
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_what_the_codes_stand_for(kind: str) -> None:
    model = quantised(kind)
    layer = model.model.layers[0].mlp.up_proj
    found = QuantisedLayer.matrix(layer)
    with torch.no_grad():
        wanted = layer(torch.eye(64)).T  # by the library itself
    assert found.shape == (128, 64)
    # The products of int8 round their inputs too.
    torch.testing.assert_close(found.float(), wanted.float(), rtol=2e-2, atol=2e-3)
    # Also after a call, which moves the codes and rounds their scales to bfloat16.
    torch.testing.assert_close(QuantisedLayer.matrix(layer), found, rtol=2**-7, atol=1e-6)
    assert codes_of(model) == kind
    assert codes_of(models.llama()) is None


@pytest.mark.live
@pytest.mark.parametrize(("kind", "method"), [*((kind, "lora") for kind in KINDS), ("nf4", "dora"), ("nf4", "pissa")])
def test_peft_computes_the_same_on_the_same_codes(kind: str, method: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = quantised(kind)
    base = copy.deepcopy(model)
    made = inject(model, rank=4, method=method)
    assert len(made.layers) == 14
    assert all(isinstance(layer, QuantisedLayer) for layer in made.layers.values())
    randomise(made)
    with torch.no_grad():
        ours = model(input_ids=IDS).logits
        assert float((ours - base(input_ids=IDS).logits).abs().max()) > 1e-3
    loralens.save(read_injection(made), tmp_path / "a")
    # For evaluation bitsandbytes has other, coarser products.
    theirs = peft.PeftModel.from_pretrained(quantised(kind), tmp_path / "a").train()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS).logits, ours, rtol=1e-3, atol=1e-4)
    back = loralens.load(tmp_path / "a")
    assert {module.rank for module in back.modules.values()} == {8 if method == "pissa" else 4}


@pytest.mark.live
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_coded_base_is_trained_and_the_record_says_on_what(kind: str) -> None:
    model = quantised(kind)
    bits = {key: t.clone() for key, t in model.state_dict().items() if t.dtype in (torch.uint8, torch.int8)}
    batch = {"input_ids": IDS, "labels": IDS}
    found = fit(model, [batch], course=Course(steps=5, lr=2e-2), rank=4)
    assert found.losses[-1] < found.losses[0]
    assert (record_of(found.adapter) or {})["weights"] == kind
    found.injection.remove()
    after = model.state_dict()
    assert bits
    assert all(torch.equal(tensor, after[key]) for key, tensor in bits.items())


@pytest.mark.live
def test_an_evaluation_does_not_cut_off_gradients() -> None:
    """bitsandbytes moves its codes at the first call without gradients, and has no gradients from then on."""
    model = quantised("nf4")
    with torch.no_grad():
        model(input_ids=IDS)  # before the injection too
    made = inject(model, targets="q_proj", rank=2)
    randomise(made)
    with torch.no_grad():
        model(input_ids=IDS)
    model(input_ids=IDS, labels=IDS).loss.backward()
    first = made.layers["model.layers.0.self_attn.q_proj"]
    assert float(first.B.grad.abs().max()) > 0
