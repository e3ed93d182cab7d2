"""Stacks of experts: what they compute, what PEFT makes of them, and what is left out and said."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest

import loralens
from loralens.errors import OptionError
from loralens.training.injection import inject
from loralens.training.layers.experts import ExpertLayer
from loralens.training.readout import read_injection
from tests.marks import when_used
from tests.training.conftest import randomise
from tests.training.test_ranks import IDS, mixture

torch = pytest.importorskip("torch")
peft = when_used("peft")

# One for each order of the axes, with the name of its module of experts.
KINDS = {
    "mixtral": "mlp.experts",
    "qwen2-moe": "mlp.experts",
    "gpt-oss": "mlp.experts",
    "llama4": "feed_forward.experts",
}


def adapted(name: str, **options: Any) -> Any:
    return inject(mixture(name), rank=2, alpha=3, **options)


@pytest.mark.some(3)
@pytest.mark.parametrize(("name", "path"), KINDS.items())
def test_all_linear_adapts_the_experts_and_peft_computes_the_same(name: str, path: str, tmp_path: Path) -> None:
    made = adapted(name)
    base = mixture(name)
    stacks = {layer for layer, each in made.layers.items() if isinstance(each, ExpertLayer)}
    assert stacks == {f"model.layers.{i}.{path}.{p}" for i in range(2) for p in ("gate_up_proj", "down_proj")}
    with torch.no_grad():
        torch.testing.assert_close(made.model(input_ids=IDS).logits, base(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    randomise(made)
    with torch.no_grad():
        ours = made.model(input_ids=IDS).logits
        assert float((ours - base(input_ids=IDS).logits).abs().max()) > 1e-3
    loralens.save(read_injection(made), tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS).logits, ours, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("options", "why"), [({"method": "dora"}, "dora"), ({"dropout": 0.1}, "dropout")])
def test_what_cannot_be_adapted_is_left_out_and_said(
    options: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "loralens"):
        made = adapted("mixtral", **options)
    assert not any(isinstance(layer, ExpertLayer) for layer in made.layers.values())
    assert "all-linear leaves out 85.9 % of the weights of the layers" in caplog.text
    assert "experts.gate_up_proj (2 of them)" in caplog.text
    with pytest.raises(OptionError, match=f"is a stack of experts, which {why} does not adapt"):
        adapted("mixtral", targets="down_proj", **options)
