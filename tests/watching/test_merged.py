"""`LiveSwitchboard`: the weights of a merge, and the base after any number of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

import loralens
from loralens import MismatchError, OptionError
from loralens.watching import LiveSwitchboard
from tests import models
from tests.marks import when_used

peft = when_used("peft")

IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


def adapted(dtype: Any = torch.bfloat16, **options: Any) -> Any:
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **options})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(models.llama().to(dtype), config).eval()
        train(model)
    return model


def train(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape))


def base_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)) for name, tensor in first.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_merged_weights_are_those_of_a_merge_and_the_base_comes_back(dtype: Any, tmp_path: Path) -> None:
    models.llama().to(dtype).save_pretrained(tmp_path / "base")
    model = adapted(dtype)
    switchboard, before = LiveSwitchboard(model, budget=2.0), base_of(model)
    for cycle in range(5):
        with torch.random.fork_rng():
            torch.manual_seed(cycle)
            train(model)
        unmerged = model(IDS).logits
        with switchboard.merged():
            merged = base_of(model)
            # PEFT does not add the update a second time.
            assert torch.allclose(model(IDS).logits, unmerged, atol=0.05)
        assert not same(merged, before)
        assert same(base_of(model), before)
        assert torch.equal(model(IDS).logits, unmerged)
    switchboard.verify()
    loralens.merge(loralens.live(model), base=tmp_path / "base", output=tmp_path / "merged")
    from safetensors.torch import load_file

    written = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in merged.items():
        key = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if key in written:
            assert torch.equal(tensor, written[key]), key


def test_dora_and_saved_modules() -> None:
    model = adapted(torch.float32, use_dora=True, modules_to_save=["lm_head"])
    switchboard, before = LiveSwitchboard(model, budget=2.0), base_of(model)
    unmerged = model(IDS).logits
    with switchboard.merged():
        assert torch.allclose(model(IDS).logits, unmerged, atol=1e-4)
    assert same(base_of(model), before)


def test_refusals() -> None:
    model = adapted()
    with pytest.raises(OptionError, match="not one of PEFT"):
        LiveSwitchboard(models.llama())
    small = LiveSwitchboard(model)  # patches of tiny weights are large beside them
    before = base_of(model)
    with pytest.raises(OptionError, match="bytes to be undone"):
        small.merge()
    assert same(base_of(model), before)
    switchboard = LiveSwitchboard(model, budget=2.0)
    with switchboard.merged(), pytest.raises(OptionError, match="is merged for"):
        switchboard.merge()
    assert same(base_of(model), before)
    with pytest.raises(MismatchError, match="PEFT has unmerged"), switchboard.merged(), model.disable_adapter():
        model(IDS)


def test_a_weight_with_nan_is_restored_too() -> None:
    model = adapted()
    weight = next(p for name, p in model.named_parameters() if name.endswith("q_proj.base_layer.weight"))
    with torch.no_grad():
        # A NaN whose payload no computation would make.
        weight.view(torch.int16)[0, 0] = 0x7F85
        weight[1, 1] = float("inf")
    switchboard, before = LiveSwitchboard(model, budget=2.0), base_of(model)
    with switchboard.merged():
        pass
    assert same(base_of(model), before)


def test_a_merge_that_was_interrupted_can_be_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    switchboard, before = LiveSwitchboard(model, budget=2.0, threads=1), base_of(model)
    from loralens.merging import switchboard as room

    merge, calls = room.prepare_merge, []

    def stop(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return merge(*args, **options)

    monkeypatch.setattr(room, "prepare_merge", stop)
    with pytest.raises(KeyboardInterrupt):
        switchboard.merge()
    assert not same(base_of(model), before)
    switchboard.unmerge()
    assert same(base_of(model), before)
