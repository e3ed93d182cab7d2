"""``--once``: verbs that write take the out_proj of an ``nn.MultiheadAttention`` once."""

from pathlib import Path

import numpy as np
import pytest

import loralens
from tests.bases import peft_folder
from tests.cli.command import Command

OUT = "attn.out_proj"
run = Command().good


def attention(folder: Path, seed: int = 0) -> Path:
    """An adapter of an attention as PEFT saves it: the pair of in_proj under the attention's own name."""
    rng = np.random.default_rng(seed)
    shapes = {"attn": (24, 8), "attn.base_layer.out_proj": (8, 8), "fc": (8, 8)}
    arrays = {}
    for name, (out, in_) in shapes.items():
        arrays[f"{name}.lora_A.weight"] = rng.standard_normal((2, in_)).astype(np.float32)
        arrays[f"{name}.lora_B.weight"] = rng.standard_normal((out, 2)).astype(np.float32)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["attn", "fc"]}
    return peft_folder(folder, arrays, config)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return attention(tmp_path / "adapter")


def norm(path: Path) -> float:
    return float(np.linalg.norm(loralens.load(path)[OUT].dense()))


@pytest.mark.parametrize("verb", ["scale", "combine", "compress", "convert"])
def test_what_is_written_has_half_the_update(verb: str, adapter: Path, tmp_path: Path) -> None:
    words = {"scale": ["--by", "1"], "combine": [adapter], "compress": ["--rank", "2"], "convert": ["--to", "peft"]}
    other = attention(tmp_path / "other", seed=1) if verb == "combine" else None
    more = [other] if other else words[verb]
    for name, flags in (("plain", ()), ("once", ("--once",))):
        run(verb, adapter, *more, "-o", tmp_path / name, *flags)
    assert norm(tmp_path / "plain") == pytest.approx(2 * norm(tmp_path / "once"), rel=1e-5)
    fc = [loralens.load(tmp_path / name)["fc"].dense() for name in ("plain", "once")]
    np.testing.assert_allclose(fc[0], fc[1], atol=1e-6)
