"""Where a run computes, and what is moved there. Stand-ins for GPUs: this machine need not have one."""

from pathlib import Path
from typing import Any

import pytest

import loralens
from loralens.training.world import World
from loralens.verbs.models.models import device_of
from loralens.verbs.runs.training_options import default_dtype
from tests import models

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


def test_a_model_in_shards_is_loaded_on_the_cpu_and_moved_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is a name here: what is loaded is recorded, and so is what FSDP2 is given to move."""
    import torch.distributed.device_mesh as mesh_module
    import torch.distributed.fsdp as fsdp

    models.folder(models.llama(), tmp_path / "llama")
    (tmp_path / "d.txt").write_text("\n".join(models.TEXTS), encoding="utf-8")
    moved: list[tuple[str, str]] = []

    def sharding(module: Any, *, mesh: Any, mp_policy: Any) -> None:
        devices = {parameter.device.type for parameter in module.parameters()}
        moved.append((type(module).__name__, f"{', '.join(devices)} to {mesh} in {mp_policy.param_dtype}"))
        if len(moved) == 3:
            raise KeyboardInterrupt  # nothing more can be shown without the card

    monkeypatch.setattr(mesh_module, "init_device_mesh", lambda kind, shape: f"{shape} of {kind}")
    monkeypatch.setattr(fsdp, "fully_shard", sharding)
    monkeypatch.setattr("loralens.verbs.runs.train_adapter.device_of", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(World, "current", classmethod(lambda cls, *, shard=False: cls(0, 1, shard)))
    monkeypatch.setattr("torch.random.fork_rng", lambda **_: __import__("contextlib").nullcontext())
    monkeypatch.setattr("loralens.training.feed.torch.cuda.get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr("loralens.training.feed.torch.cuda.set_rng_state", lambda state, device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(KeyboardInterrupt):
        loralens.train(model=tmp_path / "llama", task="causal-lm", data=tmp_path / "d.txt", output=tmp_path / "o",
                       steps=1, batch=4, rank=2, shard=True, dtype="f32", threads=1)  # fmt: skip
    said = "cpu to (1,) of cuda in torch.bfloat16"
    assert moved == [*[("LlamaDecoderLayer", said)] * 2, ("LlamaForCausalLM", said)]
