"""What `convert` writes as PEFT, PEFT loads, and the model's output is that of the source's ΔW added by hand."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import loralens
from loralens.cli.main import main
from tests.marks import when_used
from tests.tolerances import LIVE_OUTPUT

torch = pytest.importorskip("torch")
peft = when_used("peft")

SHAPES = {"first": (5, 4), "inner.second": (3, 5)}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = torch.nn.Linear(4, 5)
        self.inner = torch.nn.ModuleDict({"second": torch.nn.Linear(5, 3)})
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["second"](torch.tanh(self.first(x)))


@pytest.fixture
def source() -> loralens.Adapter:
    """Two modules of different rank and scale, one negative."""
    rng = np.random.default_rng(5)
    modules = {
        name: loralens.LowRank(
            rng.normal(size=(out, rank)).astype(np.float32), rng.normal(size=(rank, in_)).astype(np.float32), scale
        )
        for (name, (out, in_)), rank, scale in zip(SHAPES.items(), (2, 3), (0.7, -1.3), strict=True)
    }
    return loralens.Adapter(modules=modules)


@pytest.mark.parametrize("through", ["kohya", "comfyui", "diffusers", "loralib"])
def test_peft_computes_what_the_source_says(source: loralens.Adapter, through: str, tmp_path: Path) -> None:
    there = tmp_path / f"there.{'bin' if through == 'loralib' else 'safetensors'}"
    loralens.save(source, there, format=through)
    arguments = ["convert", str(there), "-o", str(tmp_path / "peft"), "--to", "peft"]
    assert CliRunner().invoke(main, arguments).exit_code == 0

    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    by_hand = Net()
    before = by_hand(x)
    for name, module in source.items():
        by_hand.get_submodule(name).weight.data += torch.from_numpy(module.dense()).float()
    expected = by_hand(x)
    found = peft.PeftModel.from_pretrained(Net(), tmp_path / "peft")(x)
    assert (expected - before).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(found, expected, **LIVE_OUTPUT)
