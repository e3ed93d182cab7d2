"""Weights of blocks: names, vectors and presets as sd-webui-lora-block-weight and the Inspire Pack have them."""

import pytest

from loralens import OptionError
from loralens.core.image_models import image_models
from loralens.core.selection import weights_of_modules

MODELS = {model.name: model for model in image_models()}
UNET = {  # block of SD 1.5 in the order of a vector of 17 → a layer in it
    "BASE": "text_encoder.text_model.encoder.layers.3.mlp.fc1",
    "IN01": "unet.down_blocks.0.attentions.0.proj_in",
    "IN02": "unet.down_blocks.0.attentions.1.proj_in",
    "IN04": "unet.down_blocks.1.attentions.0.proj_in",
    "IN05": "unet.down_blocks.1.attentions.1.proj_in",
    "IN07": "unet.down_blocks.2.attentions.0.proj_in",
    "IN08": "unet.down_blocks.2.attentions.1.proj_in",
    "MID": "unet.mid_block.attentions.0.proj_in",
    "OUT03": "unet.up_blocks.1.attentions.0.proj_in",
    "OUT04": "unet.up_blocks.1.attentions.1.proj_in",
    "OUT05": "unet.up_blocks.1.attentions.2.proj_in",
    "OUT06": "unet.up_blocks.2.attentions.0.proj_in",
    "OUT07": "unet.up_blocks.2.attentions.1.proj_in",
    "OUT08": "unet.up_blocks.2.attentions.2.proj_in",
    "OUT09": "unet.up_blocks.3.attentions.0.proj_in",
    "OUT10": "unet.up_blocks.3.attentions.1.proj_in",
    "OUT11": "unet.up_blocks.3.attentions.2.proj_in",
}
SDXL = {
    "BASE": "text_encoder_2.text_model.encoder.layers.3.mlp.fc1",
    "IN04": "unet.down_blocks.1.attentions.0.proj_in",
    "IN05": "unet.down_blocks.1.attentions.1.proj_in",
    "IN07": "unet.down_blocks.2.attentions.0.proj_in",
    "IN08": "unet.down_blocks.2.attentions.1.proj_in",
    "MID": "unet.mid_block.attentions.0.proj_in",
    **{f"OUT{i:02}": f"unet.up_blocks.{i // 3}.attentions.{i % 3}.proj_in" for i in range(6)},
}
FLUX = {
    "CLIP": "text_encoder.text_model.encoder.layers.3.mlp.fc1",
    "T5": "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
    "IN": "transformer.x_embedder",
    "D00": "transformer.transformer_blocks.0.attn.to_q",
    "D18": "transformer.transformer_blocks.18.attn.to_q",
    "S00": "transformer.single_transformer_blocks.0.proj_mlp",
    "S37": "transformer.single_transformer_blocks.37.proj_mlp",
    "OUT": "transformer.proj_out",
}


def weights(architecture: str, modules: dict[str, str], **options: object) -> dict[str, float]:
    """Block → the weight that its layer gets."""
    model = MODELS[architecture]
    layers = {layer.name: layer for layer in model.layers if layer.name in modules.values()}
    found = weights_of_modules(model, layers, **options)  # type: ignore[arg-type]
    return {block: found[name] for block, name in modules.items()}


@pytest.mark.parametrize(("architecture", "modules"), [("SD 1.5", UNET), ("SD 2", UNET), ("SDXL", SDXL)])
def test_a_vector_goes_to_the_blocks_in_order(architecture: str, modules: dict[str, str]) -> None:
    expected = {block: round(0.01 * i, 2) for i, block in enumerate(modules)}
    text = ",".join(map(str, expected.values()))
    for blocks in (text, f"NAME:{text}", list(expected.values())):
        assert weights(architecture, modules, blocks=blocks) == expected


@pytest.mark.parametrize(
    ("blocks", "changed"),
    [
        ("IN04=0,MID=0.5", {"IN04": 0, "MID": 0.5}),
        ("in4=0, m00=0.5", {"IN04": 0, "MID": 0.5}),
        ({"IN04": 0, "MID1": 0.5}, {"IN04": 0, "MID": 0.5}),
        ("IN05-IN08=0", {"IN05": 0, "IN07": 0, "IN08": 0}),
        ("OUT09-11=-1", {"OUT09": -1, "OUT10": -1, "OUT11": -1}),
        ("BASE=0", {"BASE": 0}),
        # The numbers of the % form count the blocks that the adapter has: IN01, IN02, IN04 …
        ("%in3=0,base=0.5,out1-2=2", {"IN04": 0, "BASE": 0.5, "OUT03": 2, "OUT04": 2}),
    ],
)
def test_blocks_by_name(blocks: object, changed: dict[str, float]) -> None:
    assert weights("SD 1.5", UNET, blocks=blocks) == dict.fromkeys(UNET, 1.0) | changed


def test_presets_of_both_tools() -> None:
    on = {"BASE", "IN05", "IN07", "IN08"}
    assert weights("SD 1.5", UNET, preset="IND") == {block: float(block in on) for block in UNET}
    assert weights("SDXL", SDXL, preset="SDXL-MIDALL") == {block: float(block in ("BASE", "MID")) for block in SDXL}
    single = {"S00", "CLIP", "T5", "IN", "OUT"}
    assert weights("FLUX.1", FLUX, preset="flux-single-1to10") == {block: float(block in single) for block in FLUX}
    # Blocks by name come after the preset.
    assert weights("SD 1.5", UNET, preset="NONE", blocks="MID=0.5")["MID"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": "IN12=0"}, "no block 'IN12'"),
        ({"blocks": "D01=0"}, "no block 'D01'"),
        ({"blocks": "IN04"}, "'IN04', which is not BLOCK=WEIGHT"),
        ({"blocks": "IN04=0,MID"}, "'MID', which is not BLOCK=WEIGHT"),
        ({"blocks": "IN04=nan"}, "'nan', which is not a number"),
        ({"blocks": "1,0,R"}, "random weights"),
        ({"blocks": "1,0,1"}, "3 numbers, and vectors for SD have 17, 26, 27"),
        ({"preset": "SDXL-INALL"}, "is not a preset for SD"),
    ],
)
def test_what_cannot_be_read_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        weights("SD 1.5", UNET, **options)
