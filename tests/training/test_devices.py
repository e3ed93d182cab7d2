"""Where a run computes, and what is moved there. Stand-ins for GPUs: this machine need not have one."""

from typing import Any

import pytest

from loralens.verbs.models.models import device_of
from loralens.verbs.runs.training_options import default_dtype

torch = pytest.importorskip("torch")


def test_a_process_tries_its_own_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    zeros = torch.zeros

    def trying(*size: int, device: Any) -> Any:
        tried.append(str(device))
        return zeros(*size)

    monkeypatch.setattr(torch, "zeros", trying)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(device_of("auto")) == str(device_of("cuda")) == "cuda:3"
    assert str(device_of("cuda:1")) == "cuda:1"  # the choice of the user
    assert tried == ["cuda:3", "cuda:3", "cuda:1"]


@pytest.mark.parametrize(
    ("device", "capability", "dtype"),
    [("cpu", (0, 0), "f32"), ("mps", (0, 0), "f32"), ("cuda:0", (9, 0), "bf16"), ("cuda:0", (7, 5), "f16")],
)
def test_the_weights_have_16_bits_on_cuda_alone(
    device: str, capability: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert default_dtype(torch.device(device)) == dtype
