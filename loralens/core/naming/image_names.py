"""Names of the modules of image models: in a diffusers pipeline, in ComfyUI, and in kohya's sd-scripts.

What the two programs look up, read from their own code; a name that they do not have is ignored without an error:

- ComfyUI 0.3.64: ``model_lora_keys_unet`` and ``model_lora_keys_clip`` of ``comfy/lora.py``, the maps of
  ``comfy/utils.py`` (``unet_to_diffusers``, ``flux_to_diffusers`` …), ``comfy/lora_convert.py``, and the leaves of
  ``comfy/weight_adapter``;
- sd-scripts 0.10.1: ``LoRANetwork`` of ``networks/lora.py`` for SD and SDXL; the names of the layers of other models
  are those of the checkpoint, flattened.

transformers 5 has no ``text_model`` around the layers of ``CLIPTextModel`` any more; both programs look for it.
"""

import re
from collections.abc import Iterable

_ATTENTION = r"proj_in|proj_out|transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"
_NORMS = r"attentions\.\d+\.(norm|transformer_blocks\.\d+\.norm[123])|resnets\.\d+\.norm[12]"
_IN_BLOCK = rf"attentions\.\d+\.({_ATTENTION})|resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)"
_LAYERS = (
    rf"((down|up)_blocks\.\d+|mid_block)\.({_IN_BLOCK})|(down_blocks\.\d+\.down|up_blocks\.\d+\.up)samplers\.0\.conv"
)
_OUTSIDE = r"conv_in|conv_out|conv_norm_out|(time|add|class)_embedding\.linear_[12]"

_UNET_ROOT = re.compile(
    rf"^((down|up)_blocks\.\d+|mid_block)\.(attentions|resnets|downsamplers|upsamplers|motion_modules)\.|^({_OUTSIDE})$"
)
_UNET = re.compile(rf"^({_LAYERS}|{_OUTSIDE}|((down|up)_blocks\.\d+|mid_block)\.({_NORMS}))$")
_CLIP_LAYER = re.compile(
    r"^(text_model\.)?encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]|layer_norm[12])$"
)
_CLIP_KNOWN = re.compile(r"^text_model\.encoder\.layers\.([12]?\d|3[01])\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$")
_JOINT = re.compile(
    r"^(single_transformer_blocks\.\d+\.|transformer_blocks\.\d+\.(attn\.|norm1_context\.|ff_context\.))"
)
_TRANSFORMERS = re.compile(  # SD3, FLUX, AuraFlow, PixArt, HunyuanVideo, HiDream, Qwen-Image
    r"^((single_|joint_)?transformer_blocks|(double|single)(_stream)?_blocks)\.\d+\."
    r"|^((controlnet_)?x_embedder|context_embedder|norm_out\.linear|proj_out|pos_embed\.proj|time_text_embed\..+|time_step_embed\..+"
    r"|time_step_proj\..+|register_tokens|adaln_single\..+|caption_projection\..+|img_in|txt_in|time_text_in\..+)$"
)


def _with_underscores(regex: re.Pattern[str]) -> re.Pattern[str]:
    """The same names with underscores for dots."""
    return re.compile(regex.pattern.replace(r"\.", "_"))


_FLAT_UNET_ROOT, _FLAT_UNET = _with_underscores(_UNET_ROOT), _with_underscores(_UNET)
_FLAT_CLIP, _FLAT_CLIP_KNOWN = _with_underscores(_CLIP_LAYER), _with_underscores(_CLIP_KNOWN)
_FLAT_LAYERS = re.compile(_LAYERS.replace(r"\.", "_"))

ENCODERS = ("text_encoder.", "text_encoder_2.", "text_encoder_3.")
_LEAF = re.compile(  # of an update, as ComfyUI's weight adapters look them up
    r"^(?P<name>.+?)(\.lora_up\.weight|_lora\.up\.weight|\.lora_B(\.default)?\.weight|\.lora\.up\.weight|\.lora_B"
    r"|\.lora_linear_layer\.up\.weight|\.hada_w1_a|\.lokr_w1(_a)?|\.lokr_w2(_a)?|\.diff)$"
)
_USO = ("single_blocks.37.processor.qkv_lora.up.weight", "double_blocks.18.processor.qkv_lora2.up.weight")


def in_pipeline(name: str) -> str:
    """The name of a module in its pipeline, as its diffusers checkpoint on the Hub has it.

    ``unet.`` before the layers of a UNet and ``transformer.`` before those of FLUX, SD3 and kin, where the name is that
    of the component alone; CLIP's layers under ``text_model.``. Every other name stays.
    """
    for encoder in ENCODERS:
        inner = name.removeprefix(encoder)
        if inner != name:
            return f"{encoder}text_model.{inner}" if inner.startswith("encoder.") and _CLIP_LAYER.match(inner) else name
    if _UNET_ROOT.match(name):
        return f"unet.{name}"
    return f"transformer.{name}" if _JOINT.match(name) else name


def lone_encoder(names: Iterable[str]) -> str | None:
    """The first name of a CLIP text encoder's layer that does not say which encoder of a pipeline; None if none is."""
    return next((name for name in names if _CLIP_LAYER.match(name)), None)


def comfyui_has(name: str) -> bool:
    """Whether ComfyUI can have a module of this name, as a file has it.

    False where it cannot, whatever the model; names that depend on the model's own layers are taken for good.
    """
    prefix, _, inner = name.partition(".")
    if prefix in ("text_encoder", "text_encoder_2"):
        return bool(_CLIP_KNOWN.match(inner))
    if prefix == "text_encoders":
        return True
    if prefix == "diffusion_model":
        foreign = inner.startswith(("single_transformer_blocks.", "transformer_2."))
        return not (foreign or _UNET_ROOT.match(inner) or _CLIP_LAYER.match(inner))
    if prefix == "transformer":
        return True
    if name.startswith("base_model.model."):
        return _is_mapped(name.removeprefix("base_model.model."))
    if name.startswith("unet.base_model.model."):  # old scripts for PixArt
        return _is_mapped(name.removeprefix("unet.base_model.model."))
    if prefix == "unet" or _UNET_ROOT.match(name):
        return _processed(name.removeprefix("unet."))
    if "." not in name:
        return _flat_is_known(name)
    return prefix not in ("text_encoder_3", "text_model", "transformer_2") and not _CLIP_LAYER.match(name)


def comfyui_may_lack(name: str) -> bool:
    """Whether a name is one of a diffusers transformer that ComfyUI 0.3.64 maps for no model; later ones may."""
    return name.startswith("transformer.") and not _is_mapped(name.removeprefix("transformer."))


def _is_mapped(name: str) -> bool:
    """Whether a layer of a diffusers transformer has a name of the models that ComfyUI has maps for."""
    return bool(_TRANSFORMERS.match(name))


def comfyui_unet(name: str) -> str | None:
    """What ComfyUI calls a layer of a UNet, from its name in diffusers without ``unet.``; None for one it has not."""
    if not _UNET.match(name):
        return None
    return name.replace(".to_", ".processor.to_").removesuffix(".0" if name.endswith(".to_out.0") else "")


def _processed(name: str) -> bool:
    """Whether a name is one that `comfyui_unet` gives."""
    plain = f"{name}.0" if name.endswith(".processor.to_out") else name
    return comfyui_unet(plain.replace(".processor.to_", ".to_")) == name


def _flat_is_known(name: str) -> bool:
    """Whether ComfyUI can have a name with underscores for dots."""
    if name.startswith(("lora_unet_unet_", "lora_unet_text_model_", "lora_unet_single_transformer_blocks_")):
        return False
    if name.startswith("lora_unet__"):
        return True  # Wan-Fun, which comfy/lora_convert.py renames
    for prefix in ("lora_unet_", "lycoris_"):
        inner = name.removeprefix(prefix)
        if inner != name:
            return not _FLAT_CLIP.match(inner) and bool(not _FLAT_UNET_ROOT.match(inner) or _FLAT_UNET.match(inner))
    encoder = re.match(r"lora_te[123]?_(?P<inner>.+)", name)
    if encoder:
        inner = encoder["inner"]
        is_layer = bool(_FLAT_CLIP_KNOWN.match(inner)) or inner == "text_projection"
        return is_layer or inner.startswith(("encoder_block_", "encoder_layer_"))  # T5, and HunyuanDiT's BERT
    return name.startswith(("lora_transformer_", "lora_prior_"))


def sd_scripts_has(name: str) -> bool:
    """Whether sd-scripts can have a module of this name, as a file has it; as `comfyui_has` otherwise."""
    encoder = re.match(r"lora_te[123]?_(?P<inner>.+)", name)
    if encoder:
        inner = encoder["inner"]
        is_layer = bool(re.match(r"text_model_encoder_layers_\d+_(self_attn_(q|k|v|out)_proj|mlp_fc[12])$", inner))
        return is_layer or inner.startswith("encoder_block_")  # T5 of FLUX and SD3
    inner = name.removeprefix("lora_unet_")
    if inner == name or "." in name or inner.startswith(("unet_", "text_model_", "single_transformer_blocks_")):
        return False
    flat_unet = _FLAT_UNET_ROOT.match(inner)
    return not _FLAT_CLIP.match(inner) and bool(not flat_unet or _FLAT_LAYERS.fullmatch(inner))


def file_name(keys: Iterable[str]) -> str | None:
    """What a file calls a module, from the keys of its update; None where ComfyUI knows none of them."""
    keys = list(keys)
    return next((found["name"] for key in keys if (found := _LEAF.match(key))), None)


def is_uso(keys: Iterable[str]) -> bool:
    """Whether a file is of XLabs' names and complete, which ComfyUI renames (``convert_uso_lora``)."""
    return set(_USO) <= set(keys)
