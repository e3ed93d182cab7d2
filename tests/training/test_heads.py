"""Heads of models in 16 bits: trained in float32, and put back as they were."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from loralens.training import inject, read_injection  # noqa: E402


class Model(nn.Module):
    """A layer to adapt, a head of two layers and a running statistic, and something behind it."""

    def __init__(self, dtype: "torch.dtype") -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Linear(6, 5)
            self.head = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
            self.end = nn.Linear(4, 3)
        self.to(dtype)
        self.eval()

    def forward(self, x: "torch.Tensor") -> "torch.Tensor":
        found: torch.Tensor = self.end(self.head(self.body(x)))
        return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_of_16_bits_is_trained_in_32_and_put_back(dtype: "torch.dtype") -> None:
    model, x = Model(dtype), torch.ones(7, 6, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        plain = model(x)
    made = inject(model, targets=["body"], rank=2, heads=["head"])
    assert {str(parameter.dtype) for parameter in made.parameters} == {"torch.float32"}
    with torch.no_grad():
        output = model(x)
    assert output.dtype == dtype
    torch.testing.assert_close(output, plain)
    optimiser = torch.optim.AdamW(made.groups(lr=1e-4))
    for _ in range(3):
        model(x).float().square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    moved = {name: p.detach() - before[name].float() for name, p in model.named_parameters() if name.startswith("head")}
    assert all(torch.isfinite(step).all() for step in moved.values())
    assert 0 < moved["head.0.weight"].abs().max() < 4e-4  # three steps of 1e-4, which 16 bits would round away
    extra = {key: one.tensor.read() for key, one in read_injection(made).extra.items()}
    assert extra["base_model.model.head.0.weight"].dtype == np.float32
    made.remove()
    after = model.state_dict()
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    with torch.no_grad():
        assert torch.equal(model(x), plain)
