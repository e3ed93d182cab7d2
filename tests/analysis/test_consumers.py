"""What servers and loaders would refuse or ignore."""

from typing import Any

import numpy as np
import pytest

import loralens
from loralens.core import Extra, LazyArray


def adapter(*roles: str, form: str = "peft", rank: int = 2) -> loralens.Adapter:
    """One pair, and a tensor for each role."""
    extra = {f"x{i}": Extra(role, "m", LazyArray.of(np.ones(2))) for i, role in enumerate(roles)}
    module = loralens.LowRank(np.ones((3, rank)), np.ones((rank, 2)))
    return loralens.Adapter(modules={"m": module}, extra=extra, format=form)


def said(adapter: loralens.Adapter, consumer: Any) -> dict[str, str]:
    (inspected,) = loralens.inspect(adapter, consumer=consumer).adapters
    return {finding.code: finding.text for finding in inspected.refusals}


def test_tensors_that_comfyui_applies_are_not_called_ignored() -> None:
    """``diff``, ``diff_b``, ``set_weight`` and ``reshape_weight`` are ComfyUI's own."""
    assert said(adapter("diff", "diff_b", "saved", "shape", form="comfyui"), "comfyui") == {}
    found = said(adapter("diff", "bias", "other", form="comfyui"), "comfyui")
    assert found == {"extra-ignored": "2 tensors that do not belong to a pair are ignored"}
    assert "extra-ignored" in said(adapter("saved"), "comfyui")


@pytest.mark.parametrize(
    ("rank", "consumer", "text"),
    [
        (16, "vllm", None),
        (17, "vllm", "rank 17 is above the default limit of 16"),
        (513, "vllm", "rank 513 is more than any --max-lora-rank takes (512)"),
        (128, "lorax", None),
        (129, "lorax", "rank 129 is more than the kernels take (128)"),
    ],
)
def test_the_bounds_of_ranks(rank: int, consumer: str, text: str | None) -> None:
    assert said(adapter(rank=rank), consumer).get("rank") == text
