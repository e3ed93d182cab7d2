"""``nn.MultiheadAttention``: PEFT trains and merges its out_proj twice, and so do we; ``--once`` takes it once."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

import loralens
from loralens.core import Attachment
from tests import models
from tests.cli.test_merge import done, run
from tests.formats.test_peft_live import Attention
from tests.marks import when_used

torch = pytest.importorskip("torch")
peft = when_used("peft")

pytestmark = pytest.mark.usefixtures("quiet_torch")
OUT = "attn.out_proj"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Any, Any, Path, Path]:
    """A base, what PEFT makes of it unmerged, and both as files."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Attention().eval()
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["attn"]))
    models.shake(adapted, 0.3).save_pretrained(tmp_path / "adapter")
    save_torch(model.state_dict(), tmp_path / "base.safetensors")
    return model, adapted.eval(), tmp_path / "adapter", tmp_path / "base.safetensors"


def answer(model: Any, weights: Path | None = None) -> Any:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))
    if weights:
        model = copy.deepcopy(model)
        model.load_state_dict(load_torch(weights))
    with torch.no_grad():
        return model(x)


def apart(found: Any, trained: Any, model: Any) -> float:
    return float((found - answer(trained)).norm() / (answer(trained) - answer(model)).norm())


def test_what_is_merged_is_what_was_trained(files, tmp_path: Path) -> None:
    model, trained, adapter, base = files
    out, once = tmp_path / "out.safetensors", tmp_path / "once.safetensors"
    result = done("merge", adapter, "--base", base, "-o", out)
    assert "attn: PEFT up to 0.21.2 adds the update of this attention's out_proj twice" in result.stderr
    assert apart(answer(model, out), trained, model) < 1e-5
    done("merge", adapter, "--base", base, "-o", once, "--once")
    assert apart(answer(model, once), trained, model) > 0.3
    W, twice, single = (load_file(file)["attn.out_proj.weight"] for file in (base, out, once))
    np.testing.assert_allclose(twice - W, 2 * (single - W), atol=1e-6)
    looked = ("--base", base, "--adapter", adapter)
    assert done("verify", out, *looked).stdout.splitlines()[0].endswith(" exactly.")
    assert done("verify", once, *looked, "--once").stdout.splitlines()[0].endswith(" exactly.")
    partly = run("verify", once, *looked)
    assert partly.exit_code == 1
    assert partly.stdout.startswith(f"{once} does not hold {adapter}")
    assert OUT in partly.stdout
    assert run("verify", out, *looked, "--once").exit_code == 1
    done("unmerge", out, "-o", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()
    for merged, options in ((out, ()), (once, ("--once",))):
        done("unmerge", merged, "--adapter", adapter, "-o", tmp_path / f"less-{merged.name}", *options)
        back = load_file(tmp_path / f"less-{merged.name}")["attn.out_proj.weight"]
        np.testing.assert_allclose(back, W, atol=1e-6)


def test_it_is_written_as_peft_adds_it(files, tmp_path: Path) -> None:
    model, _, path, _ = files
    adapter = loralens.load(path)
    loralens.save(adapter, tmp_path / "same")
    name = "adapter_model.safetensors"
    assert (tmp_path / "same" / name).read_bytes() == (path / name).read_bytes()
    written = {
        "half": adapter * 0.5,
        "sum": adapter + adapter * 0.5,
        "once": loralens.load(path, once=True),
        "other": loralens.Adapter(modules={k: m.without_origin() for k, m in adapter.items()}, format="kohya"),
    }
    for label, one in written.items():
        loralens.save(one, tmp_path / label, format="peft")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / label).eval()
        with Attachment(model, one).on():
            torch.testing.assert_close(answer(model), answer(theirs), rtol=1e-5, atol=1e-5)
        back = loralens.load(tmp_path / label)
        np.testing.assert_allclose(back[OUT].dense(), one[OUT].dense(), rtol=1e-5, atol=1e-6)
