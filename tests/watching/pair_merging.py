"""Two processes that merge one model of PEFT, divided by FSDP2: ``python -m tests.watching.pair_merging FOLDER``."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from loralens import OptionError
from loralens.watching import LiveSwitchboard
from tests import models
from tests.watching.pair import in_two, shard

IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


def adapted(dtype: Any, **options: Any) -> Any:
    """A model with odd numbers of rows, so that the processes have parts of different sizes."""
    import peft

    torch.manual_seed(1)
    model = models.llama(vocab_size=25, intermediate_size=23).to(dtype)
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "down_proj", "lm_head"], **options)
    return peft.get_peft_model(model, adapter).eval()


def train(model: Any, seed: int) -> None:
    """The same change of the factors in a whole and in a divided model."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                change = 0.05 * torch.randn(parameter.shape, dtype=parameter.dtype)
                if hasattr(parameter, "placements"):
                    change = torch.distributed.tensor.distribute_tensor(
                        change, parameter.device_mesh, parameter.placements, src_data_rank=None
                    )
                parameter.add_(change)


def own(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the parts that this process has."""
    parameters = ((name, p.detach()) for name, p in model.named_parameters() if "lora_" not in name)
    return {name: getattr(p, "to_local", lambda p=p: p)().clone() for name, p in parameters}  # type: ignore[misc]


def wholes(model: Any) -> dict[str, torch.Tensor]:
    parameters = ((name, p.detach()) for name, p in model.named_parameters() if "lora_" not in name)
    return {name: getattr(p, "full_tensor", lambda p=p: p)().clone() for name, p in parameters}  # type: ignore[misc]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)) for name, tensor in first.items()
    )


def check(dtype: Any, **options: Any) -> None:
    whole, divided = adapted(dtype, **options), shard(adapted(dtype, **options))
    before = own(divided)
    boards = [LiveSwitchboard(model, budget=3.0, threads=2) for model in (whole, divided)]
    for cycle in range(3):
        for model in (whole, divided):
            train(model, cycle)
        with torch.no_grad():
            # FSDP2 keeps the last weights whole after a forward pass.
            divided(IDS)
        with boards[0].merged(), boards[1].merged():
            assert not same(own(divided), before)
            assert same(wholes(divided), wholes(whole))
            with torch.no_grad():
                assert torch.allclose(divided(IDS).logits.float(), whole(IDS).logits.float(), atol=1e-2)
        for module in divided.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        assert same(own(divided), before)
    boards[1].verify()
    # Every process has its own rows, and patches for them alone.
    assert 0 < sum(tensor.numel() for tensor in before.values()) < sum(t.numel() for t in wholes(divided).values())


def check_that_all_refuse() -> None:
    """A budget that one process alone exceeds is refused by both, so that neither waits."""
    divided = shard(adapted(torch.bfloat16))
    before = own(divided)
    board = LiveSwitchboard(divided, budget=1000.0 if dist.get_rank() else 0.0)
    with pytest.raises(OptionError, match="bytes to be undone here"):
        board.merge()
    assert same(own(divided), before)


def work() -> None:
    check(torch.bfloat16)
    check(torch.float32)
    check(torch.float32, use_dora=True)
    check_that_all_refuse()


if __name__ == "__main__":
    in_two(Path(sys.argv[1]), work)
