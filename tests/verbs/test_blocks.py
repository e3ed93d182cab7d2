"""`scale`, `combine` and `drop` with weights of blocks, and what a new file says of its sources."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

import loralens
from loralens import OptionError
from loralens.formats.records.training_notes import trigger_words
from tests.draws import draw_adapter

KEYS = {
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (640, 768),  # IN04
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": (1280, 768),
    "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (1280, 768),  # OUT03
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
}
IN, MID, OUT, TEXT = KEYS


@pytest.fixture
def source(tmp_path: Path) -> Path:
    loralens.save(draw_adapter(0, KEYS, 2, 0.5, format="kohya"), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def scales(result: loralens.Adapter, source: Path) -> dict[str, float]:
    """What each module was multiplied by, from one number of ΔW."""
    before = loralens.load(source)
    return {name: round(float(result[name].dense()[5, 7] / before[name].dense()[5, 7]), 6) for name in KEYS}


def test_scale_multiplies_blocks(source: Path, tmp_path: Path) -> None:
    written = tmp_path / "b.safetensors"
    loralens.scale(source, preset="OUTALL", block_weights="MID=0.25,BASE=0.5", output=written)
    expected = {IN: 0, MID: 0.25, OUT: 1, TEXT: 0.5}
    assert scales(loralens.load(written), source) == expected
    result = loralens.scale(source, preset="OUTALL", block_weights={"MID": 0.25, "BASE": 0.5})
    assert scales(result.adapter, source) == expected
    assert not loralens.load(written)[IN].dense().any()


def test_by_multiplies_the_weights_and_modules_limit_them(source: Path) -> None:
    result = loralens.scale(source, 2, block_weights="IN=0.5,OUT=0.25", modules=["*attn2*"])
    assert scales(result.adapter, source) == {IN: 1, MID: 2, OUT: 0.5, TEXT: 1}


def test_combine_multiplies_the_weights_of_all_adapters(source: Path, tmp_path: Path) -> None:
    """The second adapter has the names of another dialect."""
    names = dict(zip(loralens.convert(source, to="diffusers", output=tmp_path / "d").adapter, KEYS, strict=True))
    assert not names.keys() & KEYS.keys()
    result = loralens.combine((source, 2), (tmp_path / "d", -1), block_weights="IN=0.5,OUT=0.25,MID=0,BASE=1")
    assert scales(result.adapter, source) == {IN: 0.5, MID: 0, OUT: 0.25, TEXT: 1}
    again = loralens.combine(recipe=result.recipe)
    assert scales(again.adapter, source) == {IN: 0.5, MID: 0, OUT: 0.25, TEXT: 1}
    with pytest.raises(OptionError, match="preset= and recipe= exclude each other"):
        loralens.combine(recipe=result.recipe, preset="OUTALL")


def test_a_combined_file_has_the_trigger_words_of_its_sources(source: Path, tmp_path: Path) -> None:
    adapter = loralens.load(source)
    said = [
        {"modelspec.trigger_phrase": "sks dog", "ss_tag_frequency": '{"5_dog": {"dog": 3}}'},
        {"modelspec.trigger_phrase": "sks dog, hat", "ss_tag_frequency": '{"5_dog": {"dog": 9}, "1_hat": {"hat": 2}}'},
        {"modelspec.trigger_phrase": "unwanted"},
    ]
    first, second, third = (replace(adapter, metadata=metadata) for metadata in said)
    written = tmp_path / "b.safetensors"
    loralens.combine(first, second, (third, -0.5), output=written)
    metadata = loralens.load(written).metadata or {}
    assert metadata["modelspec.trigger_phrase"] == "sks dog, hat"
    assert json.loads(metadata["ss_tag_frequency"]) == {"5_dog": {"dog": 9}, "1_hat": {"hat": 2}}
    folder = replace(adapter, metadata={"ss_dataset_dirs": '{"10_old film": {"n_repeats": 10}}'})
    both = loralens.combine(first, folder).adapter
    assert trigger_words(both.metadata) == ["sks dog, old film"]


HASHED = {
    "scale": lambda adapter, file: loralens.scale(adapter, 2, output=file),
    "combine": lambda adapter, file: loralens.combine(adapter, adapter, output=file),
    "drop": lambda adapter, file: loralens.drop(adapter, preset="OUTALL", output=file),
    "compress": lambda adapter, file: loralens.compress(adapter, rank=1, output=file),
    "convert": lambda adapter, file: loralens.convert(adapter, to="comfyui", output=file),
    "a copy": loralens.save,
}


@pytest.mark.parametrize("verb", HASHED)
def test_a_file_states_the_hash_of_its_own_tensors(verb: str, source: Path, tmp_path: Path) -> None:
    """Also where the hash of the source was of another length, as the header must not move the tensors."""
    old = {"sshs_model_hash": "old", "sshs_legacy_hash": "old", "modelspec.hash_sha256": "0xold"}
    written = tmp_path / "b.safetensors"
    HASHED[verb](replace(loralens.load(source), metadata=old), written)
    content = written.read_bytes()
    digest = sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    metadata = loralens.load(written).metadata or {}
    assert metadata["sshs_model_hash"] == digest
    assert metadata["modelspec.hash_sha256"] == f"0x{digest}"
    assert "sshs_legacy_hash" not in metadata


def test_a_combination_of_nothing_is_warned_of(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    loralens.combine((source, 0), (source, 0))
    assert "every weight is 0" in caplog.text
    caplog.clear()
    loralens.combine((source, 0), (source, -1))
    assert "every weight is 0" not in caplog.text


def test_drop_leaves_out_the_blocks_of_weight_0(source: Path) -> None:
    assert set(loralens.drop(source, preset="OUTALL").adapter) == {OUT, TEXT}
    assert set(loralens.drop(source, "*mlp_fc1", block_weights="IN04=0").adapter) == {MID, OUT}
    with pytest.raises(OptionError, match=r"weight 0\.4, and drop leaves a block out"):
        loralens.drop(source, preset="MIDD0.2")


def test_nothing_to_do_is_refused(source: Path) -> None:
    with pytest.raises(OptionError, match="nothing says how much to scale"):
        loralens.scale(source)
    with pytest.raises(OptionError, match="nothing says what to drop"):
        loralens.drop(source)


def test_models_without_such_blocks_are_refused() -> None:
    with pytest.raises(OptionError, match=r"SD 1\.5, SD 2, SDXL and FLUX\.1"):
        loralens.scale(draw_adapter(0, {"model.layers.0.q_proj": (8, 8)}), preset="OUTALL")
