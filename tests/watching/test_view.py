"""`live`: the adapter of a model in memory, in every kind of model and wrapper that trainers use."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import loralens
from loralens import Adapter, FormatError, OptionError
from loralens.training import inject, read_injection
from tests import models
from tests.marks import when_used

peft = when_used("peft")

IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


def adapted(*names: str, **options: Any) -> Any:
    """A tiny Llama with adapters of PEFT, whose B are not 0."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(models.llama(), config, adapter_name=(names or ("default",))[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        shake(model)
    return model.eval()


def shake(model: nn.Module) -> None:
    """Training moves every factor."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))


def same(view: Adapter, file: Adapter) -> None:
    assert list(view) == list(file)
    assert set(view.extra) == set(file.extra)
    for name, module in file.items():
        assert view[name].scale == module.scale
        assert view[name].layout == module.layout
        if hasattr(module, "factors"):
            assert np.array_equal(view[name].A, module.A)
            assert np.array_equal(view[name].B, module.B)
    for key, extra in file.extra.items():
        assert (view.extra[key].role, view.extra[key].module) == (extra.role, extra.module)
        assert np.array_equal(view.extra[key].tensor.read(), extra.tensor.read())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 5}},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"trainable_token_indices": {"embed_tokens": [3, 5]}},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_a_view_is_the_adapter_that_peft_saves_and_a_loaded_one_stays_so(options: Any, tmp_path: Path) -> None:
    model = adapted(**options)
    model.save_pretrained(tmp_path / "then", save_embedding_layers=False)
    then = loralens.load(tmp_path / "then")
    same(loralens.live(model), then)
    loaded = loralens.live(model).load()
    shake(model)
    same(loaded, then)
    loralens.save(loaded, tmp_path / "ours")
    same(loralens.load(tmp_path / "ours"), then)


def test_several_adapters_by_name_and_the_sum_of_the_active_ones() -> None:
    model = adapted("one", "two")
    one, two = (loralens.live(model, adapter=name) for name in ("one", "two"))
    assert loralens.equal(loralens.live(model), one).equal
    model.set_adapter("two")
    assert loralens.equal(loralens.live(model), two).equal
    model.base_model.set_adapter(["one", "two"])
    assert loralens.equal(loralens.live(model), one + two).equal
    with pytest.raises(OptionError, match="no adapter is called 'on'"):
        loralens.live(model, adapter="on")


class Module(nn.Module):
    """A module of Lightning, or of a user, around the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.policy = model


def test_wrappers_change_nothing() -> None:
    model = adapted()
    plain = loralens.live(model)
    compiled = torch.compile(model, backend="eager")
    for wrapped in (compiled, Module(model), Module(compiled), nn.DataParallel(model)):
        same(loralens.live(wrapped), plain)
    inner = adapted()
    layers = inner.base_model.model.model.layers
    for number in range(len(layers)):
        layers[number] = torch.compile(layers[number], backend="eager")  # as accelerate compiles regions
    same(loralens.live(inner), plain)


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "rslora"])
def test_an_injection_of_our_own_layers(method: str, tmp_path: Path) -> None:
    model = models.llama()
    injection = inject(model, targets=["q_proj", "down_proj"], rank=4, method=method, heads=["lm_head"])
    shake(model)
    copy = read_injection(injection)
    same(loralens.live(injection), copy)
    view = loralens.live(injection)
    shake(model)
    assert not np.array_equal(view[0].B, copy[0].B)
    loralens.save(view, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.allclose(model.eval()(IDS).logits, again(IDS).logits, atol=1e-5)


def test_refusals() -> None:
    with pytest.raises(OptionError, match="no adapter"):
        loralens.live(models.llama())
    with pytest.raises(OptionError, match="is not a model"):
        loralens.live("path")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="models with adapters at 0 and at 1"):
        loralens.live(nn.ModuleList([adapted(), adapted()]))
    prompt = peft.get_peft_model(models.llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(FormatError, match="not a LoRA"):
        loralens.live(prompt)
