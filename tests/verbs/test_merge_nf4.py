"""`merge --bits nf4`: merged in floats and quantised once; a decoded 4-bit base is refused."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens import OptionError
from loralens.formats import open_checkpoint
from tests.bases import MODULES, sharded, single
from tests.verbs.low_bit_bases import SHAPE, decode, floats, nf4_base, pair_adapter, quantise, stored, unpack


def base_tensors(dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    others = {
        "model.embed_tokens.weight": rng.standard_normal((10, 128)),
        "lm_head.weight": rng.standard_normal((10, 128)),
        "model.norm.weight": np.ones(128),
    }
    return {key: array.astype(dtype) for key, array in {**floats(), **others}.items()}


def test_all_matrices_of_blocks_become_the_nearest_codes_of_the_sum(tmp_path: Path) -> None:
    held = base_tensors()
    base = single(tmp_path / "base", held)
    adapter = pair_adapter()
    one = MODULES[0]
    result = loralens.merge(adapter, base=base, output=tmp_path / "out", bits="nf4", modules=[one])
    after = stored(tmp_path / "out")
    for name in MODULES:
        W = held[f"{name}.weight"]
        codes, absmax = quantise(W + adapter[name].dense().astype(np.float32) if name == one else W)
        np.testing.assert_array_equal(after[f"{name}.weight.absmax"], absmax)
        # The reference divides, and bitsandbytes multiplies by the reciprocal.
        assert (unpack(after[f"{name}.weight"]) != codes).mean() < 1e-3
        state = json.loads(after[f"{name}.weight.quant_state.bitsandbytes__nf4"].tobytes())
        assert state == {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(SHAPE)}
    for key in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        np.testing.assert_array_equal(after[key], held[key])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    (module,) = result.modules
    Q = decode(unpack(after[f"{one}.weight"]), after[f"{one}.weight.absmax"])
    D = adapter[one].dense()
    moved = Q - held[f"{one}.weight"]
    assert module.fidelity.gain == pytest.approx(np.sum(moved * D) / np.sum(D**2), rel=1e-4)
    assert result.certificate["bits"] == "nf4"
    assert result.certificate["total"]["tensors"] == len(MODULES)


def test_our_own_reader_reads_it_and_the_certificate_fits(tmp_path: Path) -> None:
    base = sharded(tmp_path / "base", base_tensors(ml_dtypes.bfloat16))
    loralens.merge(pair_adapter(), base=base, output=tmp_path / "out", bits="nf4")
    coded = open_checkpoint(tmp_path / "out").coded
    assert set(coded) == {f"{name}.weight" for name in MODULES}
    assert {weight.layout for weight in coded.values()} == {"bitsandbytes NF4"}
    assert loralens.verify(tmp_path / "out").answer
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    # All parts of a weight stay in the shard that it was in.
    for name in MODULES:
        assert len({shard for key, shard in index.items() if key.startswith(f"{name}.weight")}) == 1


def test_a_decoded_base_is_refused_and_a_plain_merge_into_it_is_explained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    coded = open_checkpoint(nf4_base(tmp_path / "nf4")).coded
    decoded = {key: weight.floats().read() for key, weight in coded.items()}
    base = single(tmp_path / "decoded", {**base_tensors(), **decoded})
    with pytest.raises(OptionError, match="decoded 4-bit model") as error:
        loralens.merge(pair_adapter(), base=base, output=tmp_path / "out", bits="nf4")
    assert "original" in error.value.fix
    caplog.set_level("INFO")
    loralens.merge(pair_adapter(base_model="unsloth/llama-bnb-4bit"), base=base, output=tmp_path / "floats")
    assert "quantising the merged model again would lose the adapter" in caplog.text
    caplog.clear()
    original = single(tmp_path / "original", base_tensors())
    loralens.merge(pair_adapter(base_model="unsloth/llama-bnb-4bit"), base=original, output=tmp_path / "o")
    assert "merged into the original weights" in caplog.text


@pytest.mark.parametrize("bits", ["q4_1", "q8_0"])
def test_codes_of_gguf_are_not_written_into_safetensors(tmp_path: Path, bits: str) -> None:
    base = single(tmp_path / "base", base_tensors())
    with pytest.raises(OptionError, match=f"bits='{bits}' is for GGUF models"):
        loralens.merge(pair_adapter(), base=base, output=tmp_path / "out", bits=bits)  # type: ignore[arg-type]
