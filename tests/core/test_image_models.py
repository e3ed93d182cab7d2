"""The table of the layers of image models against the model classes of diffusers and transformers."""

from typing import Any

import pytest

from loralens.core.image_models import ImageModel, Layer, image_model, image_models

Shape = tuple[int, ...]


def model(name: str) -> ImageModel:
    return next(each for each in image_models() if each.name == name)


def layer(architecture: str, name: str) -> Layer:
    return next(each for each in model(architecture).layers if each.name == name)


def weights(module: Any, prefix: str) -> dict[str, Shape]:
    """Name → shape of all linear layers and convolutions of a torch model."""
    from torch import nn

    layers = ((name, each) for name, each in module.named_modules() if isinstance(each, nn.Linear | nn.Conv2d))
    return {prefix + name: tuple(each.weight.shape) for name, each in layers}


def clip(width: int, blocks: int, prefix: str, projection: int = 0) -> dict[str, Shape]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = {"hidden_size": width, "num_hidden_layers": blocks, "intermediate_size": 4 * width}
    config = CLIPTextConfig(**sizes, projection_dim=projection)
    found = weights((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), "")
    # transformers 5 has no text_model in CLIPTextModel; pipelines on the Hub have it.
    return {
        prefix + (f"text_model.{name}" if name.startswith("encoder.") else name): each for name, each in found.items()
    }


def unet(**options: Any) -> dict[str, Shape]:
    from diffusers import UNet2DConditionModel

    return weights(UNet2DConditionModel(**options), "unet.")


SD = {"block_out_channels": (320, 640, 1280, 1280)}
XL = {
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
}


def pipeline(name: str) -> dict[str, Shape]:
    """Every layer of a whole pipeline, by the classes that load it."""
    if name == "SD 1.5":
        return unet(**SD, cross_attention_dim=768) | clip(768, 12, "text_encoder.")
    if name == "SD 2":
        heads = {"attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
        return unet(**SD, cross_attention_dim=1024, **heads) | clip(1024, 23, "text_encoder.")
    if name == "SDXL":
        return unet(**XL) | clip(768, 12, "text_encoder.") | clip(1280, 32, "text_encoder_2.", 1280)
    from diffusers import FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    t5 = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    transformer = weights(FluxTransformer2DModel(guidance_embeds=True), "transformer.")
    return transformer | clip(768, 12, "text_encoder.") | weights(T5EncoderModel(t5), "text_encoder_2.")


@pytest.mark.slow  # importing diffusers takes seconds
@pytest.mark.parametrize("name", ["SD 1.5", "SD 2", "SDXL", "FLUX.1"])
def test_every_layer_of_the_classes_is_in_the_table(name: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        expected = pipeline(name)
    assert {each.name: each.shape for each in model(name).layers} == expected


# Names that ComfyUI's unet_to_diffusers and flux_to_diffusers give (comfy/utils.py).
@pytest.mark.parametrize(
    ("architecture", "name", "original"),
    [
        ("SD 1.5", "unet.down_blocks.1.attentions.0.proj_in", "diffusion_model.input_blocks.4.1.proj_in"),
        ("SD 1.5", "unet.up_blocks.0.upsamplers.0.conv", "diffusion_model.output_blocks.2.1.conv"),
        ("SD 1.5", "unet.up_blocks.1.upsamplers.0.conv", "diffusion_model.output_blocks.5.2.conv"),
        ("SDXL", "unet.down_blocks.0.downsamplers.0.conv", "diffusion_model.input_blocks.3.0.op"),
        ("SDXL", "unet.mid_block.resnets.1.conv2", "diffusion_model.middle_block.2.out_layers.3"),
        ("SDXL", "unet.add_embedding.linear_2", "diffusion_model.label_emb.0.2"),
        ("FLUX.1", "transformer.single_transformer_blocks.9.proj_mlp", "diffusion_model.single_blocks.9.linear1"),
        ("FLUX.1", "transformer.norm_out.linear", "diffusion_model.final_layer.adaLN_modulation.1"),
    ],
)
def test_names_in_the_original_checkpoint(architecture: str, name: str, original: str) -> None:
    assert layer(architecture, name).original == original


# Names of the modules that sd-scripts makes (LoRANetwork of networks/lora.py and networks/lora_flux.py).
@pytest.mark.parametrize(
    ("architecture", "name", "file"),
    [
        ("SD 1.5", "unet.mid_block.attentions.0.proj_in", "lora_unet_mid_block_attentions_0_proj_in"),
        ("SDXL", "unet.mid_block.attentions.0.proj_in", "lora_unet_middle_block_1_proj_in"),
        ("FLUX.1", "transformer.transformer_blocks.3.attn.to_k", "lora_unet_double_blocks_3_img_attn_qkv"),
        ("SD 2", "text_encoder.text_model.encoder.layers.1.mlp.fc1", "lora_te_text_model_encoder_layers_1_mlp_fc1"),
        ("SDXL", "text_encoder.text_model.encoder.layers.1.mlp.fc1", "lora_te1_text_model_encoder_layers_1_mlp_fc1"),
        ("SDXL", "text_encoder_2.text_model.encoder.layers.1.mlp.fc1", "lora_te2_text_model_encoder_layers_1_mlp_fc1"),
        (
            "FLUX.1",
            "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        ),
    ],
)
def test_names_in_files_of_kohya(architecture: str, name: str, file: str) -> None:
    assert model(architecture).kohya(layer(architecture, name)) == file


def test_every_name_of_every_dialect_is_found_again() -> None:
    for each in image_models():
        for one in each.layers:
            assert each.find(one.name, one.update_shape) == (one,)
            whole = each.by_original[one.original]
            shape = sum(part.shape[0] for part in whole), one.update_shape[1]
            assert each.find(one.original, shape) == whole
            # kohya's file holds the whole matrix, except for SD, whose UNet it names as diffusers does.
            assert one in each.find(each.kohya(one), shape if each.kohya_original else one.update_shape)


ATTN1 = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("modules", "hint", "expected"),
    [
        ({ATTN1.replace("attn1.to_q", "attn2.to_k"): (640, 768)}, None, "SD 1.5"),
        ({ATTN1.replace("attn1.to_q", "attn2.to_k"): (640, 1024)}, None, "SD 2"),
        ({ATTN1.replace("attn1.to_q", "attn2.to_k"): (640, 2048)}, None, "SDXL"),
        ({ATTN1: (640, 640)}, None, "SD 1.5"),  # SDXL has it as well
        ({ATTN1: (640, 640)}, "sdxl_base_v1-0", "SDXL"),
        ({"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (640, 640)}, None, "SDXL"),
        ({"lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072)}, None, "FLUX.1"),
        ({ATTN1: (640, 641)}, None, None),
        ({ATTN1: (640, 640), "unet.something": (640, 640)}, None, None),
        ({}, "sdxl", None),
        ({"transformer_blocks.59.attn.to_q": (3072, 3072)}, None, "Qwen-Image"),
        ({"transformer_blocks.0.attn.to_q": (3072, 3072)}, None, "FLUX.1"),
        ({"transformer_blocks.0.attn.to_q": (3072, 3072)}, "Qwen/Qwen-Image", "Qwen-Image"),
        ({"blocks.0.self_attn.q": (1536, 1536)}, None, "Wan 1.3B"),
        ({"blocks.0.attn1.to_q": (48, 48)}, None, "Wan"),  # a size that is not in the table
        ({"transformer_blocks.0.attn1.to_q": (48, 48)}, None, None),  # several models have this name
        ({"blocks.0.attn1.to_q": (48, 48), "blocks.0.attn1.other": (48, 48)}, None, None),
    ],
)
def test_the_architecture_follows_from_names_and_shapes(
    modules: dict[str, Shape], hint: str | None, expected: str | None
) -> None:
    found = image_model(modules, [hint])
    assert (found and found.name) == expected
