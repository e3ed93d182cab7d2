"""The judge of merged weights knows the answers, and merges by loralens are the nearest that a dtype can store."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from benchmarks import judge, synthetic_low_bit
from benchmarks.others import gguf
from benchmarks.others.merged import Adapted, errors, of_ggufs, of_models
from benchmarks.synthetic_model import TINY, make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def test_errors_are_relative_to_the_update() -> None:
    W, update = np.ones((1, 2)), np.array([[3.0, 4.0]])
    results = {"unmerged": W, "twice": W + 2 * update, "half": W + 0.5 * update, "one off": W + update + [[0.0, 0.5]]}
    found = errors([Adapted(W, update, W + update, results)])
    assert found["nearest"] == {"error": 0.0, "strength": 1.0}
    assert found["unmerged"] == {"error": 1.0, "strength": 0.0}
    assert found["twice"] == {"error": 1.0, "strength": 2.0}
    assert found["half"] == {"error": 0.5, "strength": 0.5}
    assert found["one off"] == {"error": 0.1, "strength": 1.08}


def test_a_merge_of_a_model(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = tiny
    loralens.merge(adapter, base=base, output=tmp_path / "ours", undo="none", certificate="none")
    (one_file := tmp_path / "one_file").mkdir()  # whatever the files are called, and exact
    pairs = judge.factors(adapter)
    weights = {key: W for file in base.glob("*.safetensors") for key, W in load_file(file).items()}
    exact = {f"{name}.weight": weights[f"{name}.weight"].astype(np.float32) + (B @ A) for name, (B, A) in pairs.items()}
    save_file({key: W.astype(np.float32) for key, W in exact.items()}, one_file / "all.safetensors")
    found = errors(of_models(base, adapter, {"ours": tmp_path / "ours", "exact": one_file, "base": base}))
    assert found["exact"]["error"] < 1e-4
    assert found["base"] == {"error": 1.0, "strength": 0.0}
    assert 0.05 < found["nearest"]["error"] < 0.5  # ΔW is a hundredth of W, and bf16 has eight bits
    assert found["ours"]["error"] == pytest.approx(found["nearest"]["error"], rel=1e-3)


@pytest.mark.parametrize("kind", gguf.KINDS)
def test_a_merge_of_a_gguf_model(kind: str, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = tiny
    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    synthetic_low_bit.gguf(base, kind, TINY)
    loralens.merge(adapter, base=base, output=out, dtype="f16", undo="none", certificate="none")
    found = errors(of_ggufs(base, adapter, {"ours": out, "base": base}, synthetic_low_bit.NAMES))
    assert found["base"] == {"error": 1.0, "strength": 0.0}
    assert 0 < found["nearest"]["error"] < 0.1
    assert found["ours"]["error"] == pytest.approx(found["nearest"]["error"], rel=1e-3)  # rows of q and k are in place
