"""DoRA without magnitudes in the file: what PEFT makes of it is what we merge, run, combine and write."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from tests import models
from tests.cli.test_merge import done
from tests.marks import when_used
from tests.merging.test_merge_live import arrays, lazily, ours

torch = pytest.importorskip("torch")
peft = when_used("peft")

pytestmark = [
    pytest.mark.usefixtures("quiet_torch"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),
    pytest.mark.filterwarnings("ignore:Model .* `tie_word_embeddings=True`"),
]
MAGNITUDE = ".lora_magnitude_vector"


class Net(torch.nn.Module):
    """A convolution, an embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(9, 12)
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.linear = torch.nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        seen = self.words(x).reshape(len(x), 3, 4, -1)[..., :4]
        return self.linear(self.conv(seen).flatten(1)[:, :8])


class Case:
    name = "llama"


def net() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


def trained(model: Any, folder: Path, targets: list[str], *, cut: str = "", **options: Any) -> Path:
    """PEFT's DoRA adapter, every tensor random, without the magnitudes whose key holds ``cut``."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, use_dora=True, **options)
    models.shake(peft.get_peft_model(copy.deepcopy(model), config), 0.2).save_pretrained(
        folder, save_embedding_layers=False
    )
    file = folder / "adapter_model.safetensors"
    held = load_file(file)
    kept = {key: array for key, array in held.items() if MAGNITUDE not in key or cut not in key}
    assert len(kept) < len(held)
    save_file(kept, file, metadata={"format": "pt"})
    return folder


CASES = [
    (models.llama, ["q_proj", "down_proj"], {}),
    (models.llama, ["q_proj", "down_proj"], {"cut": "q_proj"}),  # of some modules alone
    (models.llama, ["embed_tokens", "q_proj"], {}),
    (models.gpt2, ["c_attn"], {"fan_in_fan_out": True}),
    (net, ["words", "conv", "linear"], {}),
]


@pytest.mark.some(3)
@pytest.mark.parametrize(("make", "targets", "options"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_merged_is_what_peft_merges(make, targets, options, dtype, tmp_path: Path) -> None:
    kind = getattr(torch, dtype)
    folder = trained(make(), tmp_path, targets, **options)
    adapter = loralens.load(folder)
    missing = [one.module for one in adapter.extra.values() if one.role in ("norms", "norms_in")]
    assert missing
    (finding,) = [one for one in adapter.findings if one.code == "dora-magnitudes-missing"]
    assert finding.text.startswith(f"{len(missing)} of {len(adapter)} DoRA modules have no magnitude")
    model = make().to(kind)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload().state_dict()
    case = Case()
    case.name = "gpt2" if make is models.gpt2 else "llama"
    found, before = ours(adapter, arrays(model), case), arrays(model)
    changed = 0
    for key, tensor in theirs.items():
        expected, W = lazily(tensor).read().astype(float), before[key].read().astype(float)
        unit = 2.0**-22 if kind == torch.float32 else 2.0**-7
        np.testing.assert_allclose(
            found[key].astype(float), expected, rtol=unit, atol=unit * np.abs(W).max(), err_msg=key
        )
        changed += not np.array_equal(expected, W)
    assert changed >= len(targets) - 1


def test_what_has_no_base_keeps_the_fact(tmp_path: Path) -> None:
    model = models.llama()
    model.save_pretrained(tmp_path / "base")
    source, base = trained(model, tmp_path / "adapter", ["q_proj"]), tmp_path / "base"
    names = set(loralens.load(source))

    def missing(path: Path) -> set[str]:
        adapter = loralens.load(path)
        assert adapter.config["use_dora"]
        return {one.module for one in adapter.extra.values() if one.role in ("norms", "norms_in")}

    assert missing(source) == names
    for verb, *options in (("convert", "--to", "peft"), ("compress", "--rank", 1)):
        done(verb, source, "-o", tmp_path / verb, *options)
        assert missing(tmp_path / verb) == names
    done("convert", source, "-o", tmp_path / "full", "--to", "peft", "--base", base)
    done("combine", f"{source}:0.5", f"{source}:0.5", "--base", base, "-o", tmp_path / "sum")
    done("compress", source, "--rank", 2, "--base", base, "-o", tmp_path / "same")
    tokens = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(copy.deepcopy(model), source).eval()(tokens).logits
        for name in ("full", "sum", "same"):
            written = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / name).eval()
            torch.testing.assert_close(written(tokens).logits, expected, rtol=1e-5, atol=1e-6)
    assert not missing(tmp_path / "full")
