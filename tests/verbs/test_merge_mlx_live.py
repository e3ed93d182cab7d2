"""A merge into the codes of an MLX model, against mlx itself: what it decodes of the merged model, and the way back."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens

pytestmark = pytest.mark.live
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")


def test_mlx_reads_the_update_out_of_the_merged_codes(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    rng = np.random.default_rng(0)
    base, stored, updates = tmp_path / "base", {}, {}
    for name in MODULES:
        weight = mx.array(rng.standard_normal((128, 256)).astype("f4") * 0.05)
        for part, array in zip(("weight", "scales", "biases"), mx.quantize(weight, group_size=64, bits=4), strict=True):
            stored[f"{name}.{part}"] = np.array(array)
        B, A = (rng.standard_normal(shape).astype("f4") * 0.02 for shape in ((128, 4), (4, 256)))
        updates[name] = loralens.LowRank(B, A, 2.0)
    base.mkdir()
    save_file(stored, base / "model.safetensors")
    settings = {"group_size": 64, "bits": 4}
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "quantization": settings}))
    adapter = loralens.Adapter(modules=updates)
    merged = loralens.merge(adapter, base=base, output=tmp_path / "merged", bits="keep")
    new = load_file(tmp_path / "merged" / "model.safetensors")

    def decoded(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
        parts = [mx.array(tensors[f"{name}.{part}"]) for part in ("weight", "scales", "biases")]
        return np.array(mx.dequantize(*parts, **settings)).astype("f8")

    for row in merged.modules:
        D = updates[row.fidelity.module].dense().astype("f8")
        change = decoded(new, row.fidelity.module) - decoded(stored, row.fidelity.module)
        assert np.vdot(change, D) / np.vdot(D, D) == pytest.approx(row.fidelity.gain, abs=1e-4)
        assert (change != 0).mean() == pytest.approx(row.fidelity.codes.changed, abs=1e-9)
    same = [key for key in stored if not key.endswith(".weight")]
    assert all(np.array_equal(new[key], stored[key]) for key in same)
    loralens.unmerge(tmp_path / "merged", output=tmp_path / "back")
    names = ("back", "base")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in names)
    assert one == other
    verified = loralens.verify(tmp_path / "merged", base=base, adapter=[adapter])
    assert verified.answer
    assert "bit for bit; rounding leaves a gain of " in " ".join(verified.conclusion())
