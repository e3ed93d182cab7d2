"""Names that ComfyUI 0.3.64 and sd-scripts 0.10.1 have, and such that they pass over.

The names were looked up in the programs' own maps: ComfyUI's for SD 1.5, SDXL, FLUX and SD3, sd-scripts' for SD 1.5.
"""

import pytest

from loralens.core import image_names
from loralens.core.image_names import comfyui_has, comfyui_may_lack, comfyui_unet, in_pipeline, sd_scripts_has

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
FLAT = BLOCK.replace(".", "_")
LAYER = "encoder.layers.0.self_attn.q_proj"
COMFYUI = [
    f"unet.{BLOCK}.attn1.processor.to_q",
    f"unet.{BLOCK}.attn2.processor.to_out",
    f"unet.{BLOCK}.ff.net.0.proj",
    f"unet.{BLOCK}.norm1",
    f"{BLOCK}.attn1.processor.to_v",
    "unet.down_blocks.0.resnets.1.conv1",
    "unet.down_blocks.0.resnets.0.conv_shortcut",
    "unet.down_blocks.0.downsamplers.0.conv",
    "unet.up_blocks.1.upsamplers.0.conv",
    "unet.mid_block.resnets.0.time_emb_proj",
    "unet.mid_block.attentions.0.proj_in",
    "unet.conv_in",
    "unet.time_embedding.linear_1",
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "diffusion_model.double_blocks.0.img_attn.qkv",
    f"text_encoder.text_model.{LAYER}",
    "text_encoder_2.text_model.encoder.layers.1.mlp.fc2",
    f"text_encoders.clip_l.transformer.text_model.{LAYER}",
    "transformer.transformer_blocks.0.attn.to_q",
    "transformer.transformer_blocks.0.attn.to_add_out",
    "transformer.single_transformer_blocks.0.proj_mlp",
    "transformer.x_embedder",
    f"lora_unet_{FLAT}_attn1_to_out_0",
    f"lora_unet_{FLAT}_ff_net_2",
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
    "lora_unet_conv_in",
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "lora_te1_text_model_encoder_layers_0_self_attn_out_proj",
    "lora_transformer_transformer_blocks_0_attn_to_q",
    f"lycoris_{FLAT}_attn1_to_q",
]
NOT_COMFYUI = [
    f"unet.{BLOCK}.attn1.to_q",  # as diffusers has it: no .processor
    f"unet.{BLOCK}.attn1.processor.to_out.0",
    f"unet.{BLOCK}.attn2.add_k_proj",
    "unet.down_blocks.0.motion_modules.0.proj_in",
    "unet.mid_block.upsamplers.0.conv",
    f"diffusion_model.{BLOCK}.attn1.to_q",
    "diffusion_model.conv_in",
    f"diffusion_model.{LAYER}",
    f"diffusion_model.text_model.{LAYER}",
    "diffusion_model.single_transformer_blocks.0.proj_mlp",
    f"text_encoder.{LAYER}",  # as transformers 5 has it
    "text_encoder.text_model.encoder.layers.0.layer_norm1",
    "text_encoder.text_model.encoder.layers.32.mlp.fc1",
    f"text_encoder_3.{LAYER}",
    f"{BLOCK}.attn1.to_q",
    LAYER,
    "lora_te_encoder_layers_0_mlp_fc1",
    "lora_unet_encoder_layers_0_mlp_fc1",
    "lora_unet_text_model_encoder_layers_0_mlp_fc1",
    f"lora_unet_unet_{FLAT}_attn1_to_q",
    f"lora_unet_{FLAT}_attn2_add_k_proj",
    "lora_te_text_model_encoder_layers_0_layer_norm1",
    "base_model.model.model.layers.0.self_attn.q_proj",
]
SD_SCRIPTS = [
    f"lora_unet_{FLAT}_attn1_to_out_0",
    "lora_unet_down_blocks_0_resnets_0_conv1",
    "lora_unet_mid_block_resnets_0_time_emb_proj",
    "lora_unet_down_blocks_0_downsamplers_0_conv",
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "lora_unet_double_blocks_0_img_attn_qkv",
]
NOT_SD_SCRIPTS = [
    "lora_unet_conv_in",
    "lora_unet_time_embedding_linear_1",
    f"lora_unet_{FLAT}_norm1",
    "lora_te_encoder_layers_0_mlp_fc1",
    "lora_te_text_model_encoder_layers_0_layer_norm1",
    "lora_transformer_transformer_blocks_0_attn_to_q",
    f"lycoris_{FLAT}_attn1_to_q",
    f"unet.{BLOCK}.attn1.to_q",
]


@pytest.mark.parametrize("name", COMFYUI)
def test_names_that_comfyui_has(name: str) -> None:
    assert comfyui_has(name)
    assert not comfyui_may_lack(name)


@pytest.mark.parametrize("name", NOT_COMFYUI)
def test_names_that_comfyui_passes_over(name: str) -> None:
    assert not comfyui_has(name)


@pytest.mark.parametrize("name", ["transformer.blocks.0.attn1.to_q", "transformer.h.0.mlp.fc_1"])
def test_names_that_comfyui_maps_for_no_model(name: str) -> None:
    assert comfyui_may_lack(name)


@pytest.mark.parametrize("name", SD_SCRIPTS)
def test_names_that_sd_scripts_has(name: str) -> None:
    assert sd_scripts_has(name)


@pytest.mark.parametrize("name", NOT_SD_SCRIPTS)
def test_names_that_sd_scripts_passes_over(name: str) -> None:
    assert not sd_scripts_has(name)


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        (f"{BLOCK}.attn1.to_q", f"unet.{BLOCK}.attn1.to_q"),
        ("conv_in", "unet.conv_in"),
        ("single_transformer_blocks.0.proj_out", "transformer.single_transformer_blocks.0.proj_out"),
        ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_q"),  # PixArt's or LTX'
        (f"text_encoder.{LAYER}", f"text_encoder.text_model.{LAYER}"),
        (f"text_encoder_2.text_model.{LAYER}", f"text_encoder_2.text_model.{LAYER}"),
        ("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",) * 2,
        (f"unet.{BLOCK}.attn1.to_q",) * 2,
        ("model.layers.0.self_attn.q_proj",) * 2,
        (LAYER, LAYER),
    ],
)
def test_names_in_a_pipeline(name: str, whole: str) -> None:
    assert in_pipeline(name) == whole


def test_a_text_encoder_that_could_be_any() -> None:
    assert image_names.lone_encoder(["x", LAYER]) == LAYER
    assert image_names.lone_encoder([f"text_model.{LAYER}"]) == f"text_model.{LAYER}"
    assert image_names.lone_encoder([f"text_encoder.{LAYER}", "model.encoder.layers.0.self_attn.q_proj"]) is None


def test_what_comfyui_calls_layers_of_a_unet() -> None:
    assert comfyui_unet(f"{BLOCK}.attn1.to_out.0") == f"{BLOCK}.attn1.processor.to_out"
    assert comfyui_unet(f"{BLOCK}.ff.net.0.proj") == f"{BLOCK}.ff.net.0.proj"
    assert comfyui_unet("blocks.0.proj") is None


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("a.b.lora_up.weight", "a.b"), ("a.b.lora_B.weight", "a.b"), ("a.b.lora_B.default.weight", "a.b"),
        ("a.b.lora_B", "a.b"), ("a.b.lora.up.weight", "a.b"), ("a.b_lora.up.weight", "a.b"), ("a.lokr_w2", "a"),
        ("lora_unet_a_lora_up.weight", None), ("a.lora_b", None), ("a.lora_embedding_B", None),
    ],
)  # fmt: skip
def test_leaves_that_comfyui_looks_up(key: str, name: str | None) -> None:
    assert image_names.file_name(["a.lora_down.weight", key]) == name
