"""Combining adapters of different image models, which may share a text encoder."""

import logging
from pathlib import Path

import pytest

import loralens
from loralens import MismatchError
from loralens.core.image_models import image_models
from tests.cli.command import Command
from tests.draws import draw_adapter

LAYERS = {(model.name, layer.name): layer.update_shape for model in image_models() for layer in model.layers}
CLIP = "text_encoder.text_model.encoder.layers.0.mlp.fc1"  # SD 1.5, SDXL, FLUX.1 and SD3 have it, of one shape
OWN = {
    "SD 1.5": "unet.down_blocks.0.attentions.0.proj_in",
    "SDXL": "unet.down_blocks.2.attentions.0.transformer_blocks.9.attn1.to_q",
    "FLUX.1": "transformer.transformer_blocks.0.attn.to_q",
}


def adapter(model: str) -> loralens.Adapter:
    # No table has the layers of SD3, of which this is one.
    own = OWN.get(model, "transformer.transformer_blocks.0.ff.net.2")
    shapes = {own: LAYERS.get((model, own), (1536, 6144)), CLIP: LAYERS["SD 1.5", CLIP]}
    return draw_adapter(len(model), shapes, 1, format="diffusers")


@pytest.mark.parametrize(("first", "second"), [("SD 1.5", "SDXL"), ("FLUX.1", "SDXL"), ("SD3", "SDXL")])
def test_adapters_of_two_image_models_are_combined_only_if_the_user_insists(
    first: str, second: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = adapter(first), adapter(second)
    for verb in (loralens.combine, loralens.subtract):
        with pytest.raises(MismatchError, match=f"{second}"):
            verb(a, b)
    with pytest.raises(MismatchError, match=f"{second}"):
        loralens.interpolate(a, b, 0.5)
    assert len(loralens.combine(a, b, force=True).adapter) == 3
    with caplog.at_level(logging.WARNING):
        loralens.similarity(a, b)
    assert second in caplog.text
    for name, each in (("a", a), ("b", b)):
        loralens.save(each, tmp_path / f"{name}.safetensors")
    files, out = (tmp_path / "a.safetensors", tmp_path / "b.safetensors"), tmp_path / "out.safetensors"
    assert "--force" in Command("combine").refused(*files, "-o", out)
    assert not out.exists()
    Command("combine").good(*files, "-o", out, "--force")
    assert out.exists()
