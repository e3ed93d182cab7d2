"""`merge --bits keep` into GGUF models of every block type: what gguf's own reader finds, and the way back."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, quants

import loralens
from loralens.core.adapter import Adapter
from loralens.errors import OptionError
from loralens.formats.models.checkpoint import open_checkpoint
from tests import ggufs

KINDS = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "Q5_K", "MXFP4", "Q5_0", "Q5_1", "Q2_K", "Q3_K")


def base_of(path: Path, kind: str) -> Path:
    ggufs.write(path, ggufs.llama(hidden=512 if "K" in kind else 64), kinds=kind)
    return path


def adapter_for(base: Path, share: float = 0.2) -> Adapter:
    """An adapter for q (whose rows stand in another order in the file) and down, of some of the size of the weights."""
    rng = np.random.default_rng(1)
    tensors = open_checkpoint(base).tensors
    modules: dict[str, Any] = {}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        W = tensors[f"{name}.weight"].read()
        B, A = (rng.standard_normal(shape).astype(np.float32) for shape in ((W.shape[0], 2), (2, W.shape[1])))
        modules[name] = loralens.LowRank(B, A, share * float(W.std()) / 2**0.5)
    return Adapter(modules=modules)


def decoded(path: Path) -> dict[str, Any]:
    """Every stored tensor, by gguf's own reader and decoder."""
    return {t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_arrives_and_the_base_comes_back(kind: str, tmp_path: Path) -> None:
    base, out = base_of(tmp_path / "m.gguf", kind), tmp_path / "o.gguf"
    adapter = adapter_for(base)
    result = loralens.merge(adapter, base=base, output=out, bits="keep")
    before, after = decoded(base), decoded(out)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"blk.0.attn_q.weight", "blk.1.ffn_down.weight"}
    assert out.stat().st_size == base.stat().st_size
    # Rows of down stand in order, so gguf's numbers can be compared with the update as it is.
    D = adapter["model.layers.1.mlp.down_proj"].dense()
    moved = after["blk.1.ffn_down.weight"] - before["blk.1.ffn_down.weight"]
    gain = float(np.sum(moved * D) / np.sum(D**2))
    (module,) = [each.fidelity for each in result.modules if each.fidelity.module.endswith("down_proj")]
    assert module.gain == pytest.approx(gain, abs=1e-3)
    assert 0.6 < gain < 1.2
    assert loralens.verify(out, base=base, adapter=adapter).verdict in ("exact", "rounded")
    assert all(verdict.different == 0 for verdict in loralens.verify(out, base=base, adapter=adapter).modules)
    assert loralens.verify(out).answer
    loralens.unmerge(out, output=tmp_path / "again.gguf")
    assert digest(tmp_path / "again.gguf") == digest(base)


def test_in_floats_the_decoded_weights_hold_the_whole_update(tmp_path: Path) -> None:
    base, out = base_of(tmp_path / "m.gguf", "Q4_1"), tmp_path / "o.gguf"
    adapter = adapter_for(base)
    loralens.merge(adapter, base=base, output=out, dtype="f32")
    before, after = decoded(base), decoded(out)
    D = adapter["model.layers.1.mlp.down_proj"].dense()
    np.testing.assert_allclose(after["blk.1.ffn_down.weight"], before["blk.1.ffn_down.weight"] + D, rtol=0, atol=1e-6)
    assert not list(tmp_path.glob("*undo*"))
    assert loralens.verify(out, base=base, adapter=adapter).verdict == "exact"


def test_a_folder_with_a_gguf_model_becomes_a_folder(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    base = base_of(tmp_path / "base" / "m.gguf", "Q4_1").parent
    (base / "note.txt").write_text("kept")
    loralens.merge(adapter_for(base), base=base, output=tmp_path / "out", bits="keep")
    assert (tmp_path / "out" / "note.txt").read_text() == "kept"
    loralens.unmerge(tmp_path / "out", output=tmp_path / "again")
    assert digest(tmp_path / "again" / "m.gguf") == digest(base / "m.gguf")


def test_codes_are_not_quantised_again(tmp_path: Path) -> None:
    base = base_of(tmp_path / "m.gguf", "Q4_1")
    with pytest.raises(OptionError, match="quantising their floats again loses the adapter"):
        loralens.merge(adapter_for(base), base=base, output=tmp_path / "o.gguf", bits="q4_1")


def test_threads_do_not_change_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loralens.verbs.outputs.merges import merge_run

    base = base_of(tmp_path / "m.gguf", "Q4_K")
    for threads in (1, 3):
        monkeypatch.setattr(merge_run, "THREADS", threads)
        loralens.merge(adapter_for(base), base=base, output=tmp_path / f"{threads}.gguf", bits="keep")
    assert digest(tmp_path / "1.gguf") == digest(tmp_path / "3.gguf")
