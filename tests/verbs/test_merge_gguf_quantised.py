"""`merge --bits q4_1` and `q8_0`: a GGUF base of floats, merged in floats and quantised once as ggml's package does."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants

import loralens
from loralens import Adapter, FormatError, OptionError
from loralens.formats import open_checkpoint
from loralens.formats.models.gguf_writer import write_gguf_copy
from tests import ggufs
from tests.draws import draw_adapter
from tests.formats.files import model_files
from tests.formats.test_gguf_base import STACKS, mixtral
from tests.verbs.test_merge_gguf import adapter_for, base_of, digest

DOWN = "model.layers.1.mlp.down_proj"


def raw(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """The type and the bytes of every stored tensor, by gguf's own reader."""
    return {t.name: (t.tensor_type.name, np.array(t.data)) for t in GGUFReader(path).tensors}


def head_adapter() -> Adapter:
    return draw_adapter(0, {"lm_head": (ggufs.VOCAB, ggufs.HIDDEN)}, 2, 0.1)


@pytest.mark.some(1)
@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("bits", ["q4_1", "q8_0"])
def test_the_bits_are_those_of_the_sum_quantised_once(bits: str, stored: str, tmp_path: Path) -> None:
    base, out = base_of(tmp_path / "m.gguf", stored), tmp_path / "o.gguf"
    adapter, weights = adapter_for(base), open_checkpoint(base).tensors
    result = loralens.merge(adapter, base=base, output=out, bits=bits)  # type: ignore[arg-type]
    before, after = raw(base), raw(out)
    for key, tensor in weights.items():
        name = ggufs.gguf_name(key, "llama")
        if tensor.ndim == 1:
            assert after[name][0] == before[name][0]
            np.testing.assert_array_equal(after[name][1], before[name][1])
            continue
        W = np.asarray(tensor.read(), np.float32)
        if key.removesuffix(".weight") in adapter:
            W = W + adapter[key.removesuffix(".weight")].dense().astype(np.float32)
        # The head is the embedding here, and finer than the rest.
        kind = "Q8_0" if key == "model.embed_tokens.weight" else bits.upper()
        theirs = quants.quantize(
            np.ascontiguousarray(ggufs.stored_form(key, W, "llama", (ggufs.HEADS, ggufs.HEADS_KV))),
            GGMLQuantizationType[kind],
        )
        assert after[name][0] == kind
        # A sum may round its last bit otherwise than ours, which is exact, and move a code where it is at a boundary.
        same = np.array_equal if key.removesuffix(".weight") not in adapter else lambda a, b: (a != b).mean() < 0.01
        assert same(after[name][1], theirs), key
    old, new = ({k: f.contents() for k, f in GGUFReader(path).fields.items()} for path in (base, out))
    changed = {"general.file_type": {"q4_1": 3, "q8_0": 7}[bits], "general.quantization_version": 2}
    header = ("GGUF.kv_count",)
    assert {k: v for k, v in new.items() if k not in header} == {
        k: v for k, v in (old | changed).items() if k not in header
    }
    gains = {module.fidelity.module: module.fidelity.gain for module in result.modules}
    D = adapter[DOWN].dense()
    merged = quants.dequantize(after["blk.1.ffn_down.weight"][1], GGMLQuantizationType[bits.upper()])
    moved = merged - np.asarray(weights[f"{DOWN}.weight"].read(), np.float32)
    assert gains[DOWN] == pytest.approx(np.sum(moved * D) / np.sum(D**2), rel=1e-4)
    assert loralens.verify(out).answer
    assert loralens.verify(out, base=base, adapter=adapter).verdict == "rounded"
    assert not list(tmp_path.glob("*undo*"))


def test_only_matrices_in_whole_blocks_become_codes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Experts one by one, as their stack has one type; the router stays as it is."""
    weights = mixtral()
    router = "model.layers.0.block_sparse_moe.gate.weight"
    kinds = dict.fromkeys(weights, "F16") | {router: "F32"}
    ggufs.write(tmp_path / "m.gguf", weights, kinds=kinds, names=STACKS)
    expert = "model.layers.0.block_sparse_moe.experts.1.w3"
    shape = open_checkpoint(tmp_path / "m.gguf").tensors[f"{expert}.weight"].shape
    caplog.set_level("INFO")
    adapter = draw_adapter(0, {expert: shape}, 2, 0.1)
    loralens.merge(adapter, base=tmp_path / "m.gguf", output=tmp_path / "o.gguf", bits="q8_0")
    assert "ffn_gate_inp.weight and vectors stay floats" in caplog.text
    types = {name: kind for name, (kind, _) in raw(tmp_path / "o.gguf").items()}
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"
    assert types["blk.0.ffn_up_exps.weight"] == "Q8_0"
    W, merged = (open_checkpoint(tmp_path / name).tensors[f"{expert}.weight"].read() for name in ("m.gguf", "o.gguf"))
    np.testing.assert_allclose(merged, W.astype(np.float32) + adapter[expert].dense(), atol=0.05)
    assert loralens.verify(tmp_path / "o.gguf").answer


@pytest.mark.some(1)
@pytest.mark.parametrize(("options", "kind"), [({}, "F16"), ({"dtype": "f32"}, "F32"), ({"bits": "q4_1"}, "F16")])
def test_a_head_that_was_tied_is_written(options: dict[str, str], kind: str, tmp_path: Path) -> None:
    base, out = base_of(tmp_path / "m.gguf", "F16"), tmp_path / "o.gguf"
    adapter = head_adapter()
    result = loralens.merge(adapter, base=base, output=out, **options)  # type: ignore[arg-type]
    assert raw(out)["output.weight"][0] == kind
    W = open_checkpoint(base).tensors["model.embed_tokens.weight"].read().astype(np.float32)
    head = open_checkpoint(out).tensors["lm_head.weight"].read().astype(np.float32)
    np.testing.assert_allclose(head, W + adapter["lm_head"].dense(), rtol=0, atol=4e-3)
    assert result.modules[0].fidelity.gain == pytest.approx(1, abs=1e-2)
    # Nothing takes a tensor out of a GGUF file again.
    assert not list(tmp_path.glob("*undo*"))
    with pytest.raises(OptionError, match="no undo file"):
        loralens.merge(adapter, base=base, output=tmp_path / "x.gguf", undo=tmp_path / "u", **options)  # type: ignore[arg-type]


@pytest.mark.some(1)
@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
def test_a_merge_of_floats_is_verified_and_undone(kind: str, tmp_path: Path) -> None:
    """Rows of q and k, merged or copied, stand in another order in the file."""
    base, out = base_of(tmp_path / "m.gguf", kind), tmp_path / "o.gguf"
    adapter = adapter_for(base)
    loralens.merge(adapter, base=base, output=out)
    assert loralens.verify(out).answer
    assert loralens.verify(out, base=base, adapter=adapter).verdict == "exact"
    loralens.unmerge(out, output=tmp_path / "b.gguf")
    assert digest(tmp_path / "b.gguf") == digest(base)
    # A changed row of an unmerged q is seen.
    q = "model.layers.1.self_attn.q_proj.weight"
    rows = open_checkpoint(out).tensors[q].read()[::-1]
    write_gguf_copy(model_files(out), tmp_path / "c.gguf", changes=[q], fill=lambda _: iter([rows]))
    (tmp_path / "c.merge_certificate.json").write_bytes((tmp_path / "o.merge_certificate.json").read_bytes())
    changed = loralens.verify(tmp_path / "c.gguf")
    assert changed.changed == [q]


def test_bases_that_cannot_become_such_codes_are_refused(tmp_path: Path) -> None:
    coded, floats = base_of(tmp_path / "c.gguf", "Q4_1"), tmp_path / "f.gguf"
    adapter = adapter_for(coded)
    with pytest.raises(OptionError, match="quantising their floats again loses the adapter"):
        loralens.merge(adapter, base=coded, output=tmp_path / "o.gguf", bits="q8_0")
    loralens.merge(adapter, base=coded, output=floats, dtype="f32", modules=[DOWN])
    with pytest.raises(OptionError, match="decoded 4-bit model"):
        loralens.merge(adapter, base=floats, output=tmp_path / "o.gguf", bits="q4_1")
    with pytest.raises(
        OptionError, match="bits='nf4' is for a safetensors folder, and the base is a GGUF model"
    ) as error:
        loralens.merge(adapter, base=base_of(tmp_path / "g.gguf", "F16"), output=tmp_path / "o.gguf", bits="nf4")
    assert "q4_1 or q8_0" in error.value.fix


@pytest.mark.parametrize("bits", ["q4_1", "q8_0"])
def test_numbers_beyond_the_scales_are_refused(bits: str, tmp_path: Path) -> None:
    base, out = base_of(tmp_path / "m.gguf", "F32"), tmp_path / "o.gguf"
    adapter = adapter_for(base)
    huge = Adapter(modules={name: loralens.LowRank(m.B, m.A, 1e9) for name, m in adapter.items()})
    with pytest.raises(FormatError, match="too large for the float16 scales of"):
        loralens.merge(huge, base=base, output=out, bits=bits)  # type: ignore[arg-type]
    assert not out.exists()
