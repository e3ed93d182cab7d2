"""`merge --bits keep` into GGUF models of every block type: what gguf's own reader finds, and the way back."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, quants

import loralens
from loralens import Adapter, FormatError, OptionError
from loralens.formats import open_checkpoint
from tests import ggufs
from tests.draws import draw_factors
from tests.marks import slow_except

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
        modules[name] = loralens.LowRank(*draw_factors(rng, *W.shape, 2, "f4"), share * float(W.std()) / 2**0.5)
    return Adapter(modules=modules)


def decoded(path: Path) -> dict[str, Any]:
    """Every stored tensor, by gguf's own reader and decoder."""
    return {t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


@pytest.mark.some(2)
@pytest.mark.parametrize("kind", slow_except(KINDS, "Q4_0", "Q4_K", "MXFP4"))
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


def test_a_folder_with_a_gguf_model_becomes_a_folder(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    base = base_of(tmp_path / "base" / "m.gguf", "Q4_1").parent
    (base / "note.txt").write_text("kept")
    loralens.merge(adapter_for(base), base=base, output=tmp_path / "out", bits="keep")
    assert (tmp_path / "out" / "note.txt").read_text() == "kept"
    loralens.unmerge(tmp_path / "out", output=tmp_path / "again")
    assert digest(tmp_path / "again" / "m.gguf") == digest(base / "m.gguf")


@pytest.mark.parametrize("others", ["IQ4_NL", "Q4_1"])
def test_a_type_whose_codes_cannot_be_moved_is_named(others: str, tmp_path: Path) -> None:
    """gguf's own package decodes IQ4_NL; such weights are no floats, whatever the others are."""
    weights, base = ggufs.llama(), tmp_path / "m.gguf"
    ggufs.write(base, weights, kinds={key: "IQ4_NL" if "q_proj" in key else others for key in weights})
    adapter, out = adapter_for(base), tmp_path / "o.gguf"
    movable = "" if others == "IQ4_NL" else "--bits keep, which moves the codes, or "
    with pytest.raises(OptionError, match=r"its weights are quantised \(.*IQ4_NL") as refused:
        loralens.merge(adapter, base=base, output=out)
    assert refused.value.fix == f"give {movable}--dtype bf16, which writes floats"
    with pytest.raises(FormatError, match="IQ4_NL can be read, but its codes cannot be merged into yet") as refused:
        loralens.merge(adapter, base=base, output=out, bits="keep")
    assert refused.value.fix == "write the merged model in floats: --dtype bf16"
    with pytest.raises(OptionError, match=r"its weights are codes \(.*IQ4_NL"):
        loralens.merge(adapter, base=base, output=out, bits="q4_1")
    assert not out.exists()
    loralens.merge(adapter, base=base, output=out, dtype="f32")
    assert not list(tmp_path.glob("*undo*"))
    assert loralens.verify(out, base=base, adapter=adapter).verdict == "exact"
    moved = decoded(out)["blk.1.ffn_down.weight"] - decoded(base)["blk.1.ffn_down.weight"]
    np.testing.assert_allclose(moved, adapter["model.layers.1.mlp.down_proj"].dense(), rtol=0, atol=1e-6)
    if movable:
        # What is not adapted may be stored in any type.
        loralens.merge(adapter, base=base, output=tmp_path / "kept.gguf", bits="keep", modules=("down_proj",))
        loralens.unmerge(tmp_path / "kept.gguf", output=tmp_path / "again.gguf")
        assert digest(tmp_path / "again.gguf") == digest(base)


def test_merges_into_a_single_file_are_undone_one_after_the_other(tmp_path: Path) -> None:
    base, once, twice, back = (tmp_path / f"{name}.gguf" for name in ("base", "once", "twice", "back"))
    base_of(base, "Q4_1")
    adapter = adapter_for(base)
    loralens.merge(adapter, base=base, output=once, bits="keep")
    loralens.merge(adapter, base=once, output=twice, bits="keep", seed=1)
    loralens.unmerge(twice, output=back)
    assert digest(back) == digest(once)
    with pytest.raises(OptionError, match="does not exist") as refused:
        loralens.unmerge(back, output=tmp_path / "first.gguf")
    assert "(here: once.undo.loralens, twice.undo.loralens)" in refused.value.fix
    assert "--adapter" in refused.value.fix
    loralens.unmerge(back, undo=tmp_path / "once.undo.loralens", output=tmp_path / "first.gguf")
    assert digest(tmp_path / "first.gguf") == digest(base)


def test_an_adapter_that_is_merged_again_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, once = base_of(tmp_path / "base.gguf", "Q4_1"), tmp_path / "once.gguf"
    adapter = adapter_for(base)
    loralens.merge(adapter, base=base, output=once, bits="keep")
    loralens.merge(adapter_for(base, 0.1), base=once, bits="keep", dry_run=True)
    assert "a second time" not in caplog.text
    loralens.merge(adapter, base=once, bits="keep", dry_run=True)
    assert f"was merged into {once} before, as once.merge_certificate.json says: it is added" in caplog.text
    caplog.clear()
    loralens.merge(adapter, adapter, base=base, bits="keep", dry_run=True)
    assert "adapter 1 and adapter 2 are the same adapter, which" in caplog.text
    caplog.clear()
    for name in ("a", "b"):
        loralens.save(adapter, tmp_path / name)
    loralens.merge(tmp_path / "a", tmp_path / "b", base=base, bits="keep", dry_run=True)
    assert f"{tmp_path / 'a'} and {tmp_path / 'b'} are the same adapter, which" in caplog.text
