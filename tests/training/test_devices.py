"""Where a run computes, and what is moved there. Stand-ins for GPUs: this machine need not have one."""

import pytest

from loralens.verbs.runs.training_options import default_dtype

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("device", "capability", "dtype"),
    [("cpu", (0, 0), "f32"), ("mps", (0, 0), "f32"), ("cuda:0", (9, 0), "bf16"), ("cuda:0", (7, 5), "f16")],
)
def test_the_weights_have_16_bits_on_cuda_alone(
    device: str, capability: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert default_dtype(torch.device(device)) == dtype
