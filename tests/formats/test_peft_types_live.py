"""PEFT itself as the judge of AdaLoRA, LoHa and LoKr: what we read is what it adds, and it reads the LoRA we write."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens.core import Structured
from loralens.core.weights import with_kernels
from tests.marks import when_used

torch = pytest.importorskip("torch")
peft = when_used("peft")
nn = torch.nn
from safetensors.torch import save_file  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("quiet_torch"),
    pytest.mark.filterwarnings("ignore"),  # PEFT's own, about ranks and schedules
]


class Net(nn.Module):  # type: ignore[misc]
    """A linear layer, and convolutions of one and two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(20, 30)
        self.conv2 = nn.Conv2d(12, 16, 3)
        self.conv1 = nn.Conv1d(12, 16, 5)


ADALORA = {"init_r": 6, "target_r": 2, "total_step": 20, "tinit": 1, "tfinal": 2, "lora_alpha": 10}
ALL = ["lin", "conv2", "conv1"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "loha": ("LoHaConfig", {"r": 2, "alpha": 5, "target_modules": ALL}),
    "loha-effective": (
        "LoHaConfig",
        {"r": 2, "alpha": 5, "use_effective_conv2d": True, "rank_dropout": 0.5, "target_modules": ["conv2", "conv1"]},
    ),
    "loha-patterns": (
        "LoHaConfig",
        {"r": 2, "alpha": 5, "rank_pattern": {"lin": 3}, "alpha_pattern": {"conv2": 7}, "target_modules": ALL},
    ),
    "lokr-full": ("LoKrConfig", {"r": 16, "alpha": 5, "target_modules": ALL}),
    "lokr-both": ("LoKrConfig", {"r": 1, "alpha": 5, "decompose_both": True, "target_modules": ALL}),
    "lokr-factor": (
        "LoKrConfig",
        {"r": 2, "alpha": 5, "decompose_factor": 4, "use_effective_conv2d": True, "target_modules": ALL},
    ),
    "adalora": ("AdaLoraConfig", {**ADALORA, "target_modules": ["lin", "conv2"]}),
}  # fmt: skip


def adapted(name: str) -> Any:
    torch.manual_seed(0)
    kind, fields = CASES[name]
    model = peft.get_peft_model(Net(), getattr(peft, kind)(**fields)).eval()
    for key, parameter in model.named_parameters():
        if any(part in key for part in ("lora_", "hada_", "lokr_")):
            parameter.data.normal_()
    return model


def updates(model: Any) -> dict[str, Any]:
    """Module → PEFT's own ΔW, flat to (out, in·k…)."""
    layers = {
        name: layer for name, layer in model.base_model.model.named_modules() if hasattr(layer, "get_delta_weight")
    }
    return {
        name: layer.get_delta_weight("default").detach().double().flatten(1).numpy() for name, layer in layers.items()
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, update in expected.items():
        np.testing.assert_allclose(found[name], update, rtol=0, atol=3e-6 * np.linalg.norm(update))


@pytest.mark.parametrize("name", CASES)
def test_reads_what_peft_adds_and_peft_reads_the_lora_that_is_written(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    model.save_pretrained(tmp_path / "in")
    expected = updates(model)
    adapter = loralens.load(tmp_path / "in")
    assert_same({key: module.dense() for key, module in adapter.items()}, expected)
    shapes = {key: tuple(tensor.shape) for key, tensor in Net().state_dict().items()}
    adapter = with_kernels(adapter, {key: shapes[f"{key}.weight"] for key in adapter})
    plain = adapter.map(lambda module: module.truncated(module.rank) if isinstance(module, Structured) else module)
    loralens.save(plain, tmp_path / "out")
    back = peft.PeftModel.from_pretrained(Net(), tmp_path / "out")
    assert back.peft_config["default"].peft_type == "LORA"
    assert_same(updates(back), expected)


@pytest.mark.parametrize("name", ["loha", "lokr-both", "adalora"])
def test_a_verb_with_the_base_writes_kernels_that_peft_loads(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "base").mkdir()
    save_file(Net().state_dict(), tmp_path / "base" / "model.safetensors")
    convolutions = [name for name in loralens.load(tmp_path / "in") if name.startswith("conv")]
    loralens.drop(tmp_path / "in", modules=["lin"], base=tmp_path / "base", output=tmp_path / "kept", to="peft")
    loralens.negate(tmp_path / "kept", output=tmp_path / "out", base=tmp_path / "base")
    back = updates(peft.PeftModel.from_pretrained(Net(), tmp_path / "out"))
    assert_same(back, {key: -update for key, update in updates(model).items() if key in convolutions})
