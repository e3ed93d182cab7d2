"""Names of the modules of image models: in a diffusers pipeline, in ComfyUI, and in kohya's sd-scripts.

ComfyUI and sd-scripts ignore names that they do not know without an error. The names that they look up were read from
their code:

- ComfyUI 0.33.0 and 0.38.1: ``model_lora_keys_unet`` and ``model_lora_keys_clip`` of ``comfy/lora.py``, the maps of
  ``comfy/utils.py`` (``unet_to_diffusers``, ``flux_to_diffusers`` …), ``comfy/lora_convert.py``, and the leaves of
  ``comfy/weight_adapter``;
- sd-scripts 0.10.1: ``LoRANetwork`` of ``networks/lora.py`` for SD and SDXL; the names of the layers of other models
  are those of the checkpoint, flattened.

In transformers 5 there is no ``text_model`` around the layers of ``CLIPTextModel`` any more, but both programs still
look for it.
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
# ComfyUI maps the names of layers 0 to 31 of a CLIP encoder, and of no others.
_CLIP_KNOWN = re.compile(r"^text_model\.encoder\.layers\.([12]?\d|3[01])\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$")
_JOINT = re.compile(
    r"^(single_transformer_blocks\.\d+\.|transformer_blocks\.\d+\.(attn\.|norm1_context\.|ff_context\.))"
)
# Layers that Wan and similar models have in diffusers; their checkpoints have other names.
_WAN = r"blocks\.\d+\.(attn[12]\.(to_|add_)|ffn\.net\.)"
# A layer of any transformer of diffusers with its own names, and of no other model.
_DIFFUSERS_BLOCK = re.compile(rf"^((single_)?transformer_blocks\.\d+\.|{_WAN})")
LANGUAGE_MODEL = re.compile(r"^transformer\.(h|wte|wpe|encoder|word_embeddings)\.")  # GPT-2, Falcon, ChatGLM …
_TRANSFORMERS = re.compile(  # SD3, FLUX, AuraFlow, PixArt, HunyuanVideo, HiDream, Qwen-Image, Z-Image, Krea 2 …
    r"^((single_|joint_)?transformer_blocks|(double|single)(_stream)?_blocks|text_fusion\.(layerwise|refiner)_blocks"
    r"|(visual|text)_transformer_blocks)\.\d+\."
    r"|^(layers|noise_refiner|context_refiner)\.\d+\.(attention|feed_forward|adaLN_modulation)\."
    r"|^(all_final_layer\.2-1\..+|all_x_embedder\.2-1|cap_embedder\..+|t_embedder\.mlp\.[02]|text_fusion\.projector)$"
    r"|^((controlnet_)?x_embedder|context_embedder|norm_out\.linear|proj_out|pos_embed\.proj|time_text_embed\..+|time_step_embed\..+"
    r"|time_step_proj\..+|register_tokens|adaln_single\..+|caption_projection\..+|img_in|txt_in|time_text_in\..+)$"
)
# The layers of models whose own names ComfyUI takes without a prefix, beside those of `_TRANSFORMERS`: Mochi, ACE-Step,
# Omnigen 2, LTX; and those of HiDream-O1 below ``model.``.
_BARE = re.compile(
    r"^(blocks\.\d+\.(attn\.(qkv|proj|q_norm|k_norm)_[xy]|mlp_[xy]\.|mod_[xy])"
    r"|(lyric_encoder|genre_embedder|speaker_embedder|lyric_embs|lyric_proj|final_layer|ref_image_refiner|patchify_proj"
    r"|adaln_single|audio_\w+|model\.diffusion_model)\b)"
)


def _with_underscores(regex: re.Pattern[str]) -> re.Pattern[str]:
    """The same names with underscores for dots."""
    return re.compile(regex.pattern.replace(r"\.", "_"))


# kohya's names, in which underscores stand for dots.
_FLAT_UNET_ROOT, _FLAT_UNET = _with_underscores(_UNET_ROOT), _with_underscores(_UNET)
_FLAT_CLIP, _FLAT_CLIP_KNOWN = _with_underscores(_CLIP_LAYER), _with_underscores(_CLIP_KNOWN)
_FLAT_LAYERS = re.compile(_LAYERS.replace(r"\.", "_"))

# HunyuanVideo as musubi-tuner trains it, with the first names of its layers. ComfyUI maps these only after
# ``diffusion_model.`` and ``transformer.``.
MUSUBI_HUNYUAN = re.compile(
    r"lora_unet_((double|single)_blocks_\d+_((img|txt)_mod_linear|(img|txt)_mlp_fc[12]|modulation_linear)"
    r"|(time|guidance)_in_mlp_[02])$"
)
ENCODERS = ("text_encoder.", "text_encoder_2.", "text_encoder_3.")
ORIGINAL = ("diffusion_model.", "model.diffusion_model.", "text_encoders.")  # prefixes of the original checkpoint
_WITH_COMPONENT = (*ENCODERS, *ORIGINAL, "unet.", "transformer.", "transformer_2.", "text_model.", "lora_", "lycoris_")
_LEAF = re.compile(  # a key of an update: the name of its module, and an ending that ComfyUI's weight adapters look up
    r"^(?P<name>.+?)(\.lora_up\.weight|_lora\.up\.weight|\.lora_B(\.default)?\.weight|\.lora\.up\.weight|\.lora_B"
    r"|\.lora_linear_layer\.up\.weight|\.hada_w1_a|\.lokr_w1(_a)?|\.lokr_w2(_a)?|\.diff)$"
)
# The names by which ComfyUI recognises a file of USO: those of the last single and the last double block of FLUX.1.
_USO = ("single_blocks.37.processor.qkv_lora.up.weight", "double_blocks.18.processor.qkv_lora2.up.weight")


def in_pipeline(name: str, *, transformer: bool = False) -> str:
    """The name of a module in its pipeline, as its diffusers checkpoint on the Hub has it.

    Names of a component alone get ``unet.`` before the layers of a UNet, and ``transformer.`` before those of FLUX, SD3
    and similar models. Layers of CLIP get ``text_model.`` after their encoder. Every other name stays, unless
    ``transformer`` says that names without a component are those of a transformer.
    """
    for encoder in ENCODERS:
        inner = name.removeprefix(encoder)
        if inner != name:
            return f"{encoder}text_model.{inner}" if inner.startswith("encoder.") and _CLIP_LAYER.match(inner) else name
    # A file of the UNet alone does not repeat the name of the component.
    if _UNET_ROOT.match(name):
        return f"unet.{name}"
    alone = transformer and not name.startswith(_WITH_COMPONENT)
    return f"transformer.{name}" if alone or _JOINT.match(name) else name


def are_of_transformer(names: Iterable[str]) -> bool:
    """Whether names without a component are those of a transformer of diffusers, since one of its layers is there.

    Of a layer such as ``proj_out`` alone, the name does not tell.
    """
    return any(map(_DIFFUSERS_BLOCK.match, names))


def are_of_joint_transformer(names: Iterable[str]) -> bool:
    """As `are_of_transformer`, for a transformer with joint attention. ComfyUI has the names of such."""
    return any(map(_JOINT.match, names))


def is_of_diffusers_transformer(name: str) -> bool:
    """Whether a module is named as in a transformer of diffusers for which the original checkpoint has other names."""
    if name.startswith(("transformer.", "transformer_2.")):
        return not LANGUAGE_MODEL.match(name)
    return bool(_JOINT.match(name) or re.match(_WAN, name))


def lone_encoder(names: Iterable[str]) -> str | None:
    """The first name of a CLIP layer that does not state its text encoder; None if there is no such name."""
    return next((name for name in names if _CLIP_LAYER.match(name)), None)


def comfyui_has(name: str) -> bool:
    """Whether ComfyUI can have a module of this name (a name as a file has it).

    False means that no model in ComfyUI has such a module. Names that depend on the layers of the model count as known.
    """
    prefix, _, inner = name.partition(".")
    if prefix in ("text_encoder", "text_encoder_2"):
        return bool(_CLIP_KNOWN.match(inner))
    # ComfyUI's own names, which depend on the model.
    if prefix == "text_encoders":
        return True
    if prefix == "diffusion_model":
        foreign = inner.startswith(("single_transformer_blocks.", "transformer_2.")) or re.match(_WAN, inner)
        return not (foreign or _UNET_ROOT.match(inner) or _CLIP_LAYER.match(inner))
    if prefix == "transformer":
        return True
    if name.startswith("base_model.model."):
        return _is_mapped(name.removeprefix("base_model.model."))
    if name.startswith("unet.base_model.model."):  # old scripts for PixArt
        return _is_mapped(name.removeprefix("unet.base_model.model."))
    if prefix == "unet" or _UNET_ROOT.match(name):
        # Only names that `comfyui_unet` gives: with `.processor`, and without the `.0` of `to_out.0`.
        inner = name.removeprefix("unet.")
        plain = f"{inner}.0" if inner.endswith(".processor.to_out") else inner
        return comfyui_unet(plain.replace(".processor.to_", ".to_")) == inner
    if "." not in name:
        return _flat_is_known(name)
    return _is_mapped(name) or bool(_BARE.match(name))


def comfyui_may_lack(name: str) -> bool:
    """Whether a name is of a diffusers transformer for which ComfyUI has no map; later versions may have one."""
    return name.startswith("transformer.") and not _is_mapped(name.removeprefix("transformer."))


def _is_mapped(name: str) -> bool:
    """Whether the name of a layer occurs in the diffusers transformers for which ComfyUI has maps."""
    return bool(_TRANSFORMERS.match(name))


def comfyui_unet(name: str) -> str | None:
    """ComfyUI's name of a layer of a UNet, from its diffusers name without ``unet.``; None if it has no such layer."""
    if not _UNET.match(name):
        return None
    return name.replace(".to_", ".processor.to_").removesuffix(".0" if name.endswith(".to_out.0") else "")


def _flat_is_known(name: str) -> bool:
    """Whether ComfyUI can have a name with underscores in place of dots."""
    wrong = ("lora_unet_unet_", "lora_unet_text_model_", "lora_unet_single_transformer_blocks_")
    if name.startswith(wrong) or MUSUBI_HUNYUAN.match(name):
        return False
    # Wan-Fun, which comfy/lora_convert.py renames.
    if name.startswith("lora_unet__"):
        return True
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


def diffusers_has(name: str) -> bool:
    """Whether diffusers' converter of kohya's files can give a layer of a UNet or of a text encoder this name."""
    inner = name.removeprefix("lora_unet_")
    if inner == name:
        return sd_scripts_has(name)
    native = re.match(r"(input_blocks|middle_block|output_blocks)_\d+_|(time_embed|label_emb)_\d|out_2$", inner)
    return bool(native or _FLAT_UNET.match(inner))


def flat_names(name: str) -> tuple[str, ...]:
    """The names that diffusers' converters of kohya's files take for a layer, from its name in a pipeline."""
    component, _, inner = name.partition(".")
    prefixes = {
        "unet": ("lora_unet_",), "transformer": ("lora_transformer_",), "text_encoder": ("lora_te_", "lora_te1_"),
        "text_encoder_2": ("lora_te2_",),
    }  # fmt: skip
    return tuple(prefix + inner.replace(".", "_") for prefix in prefixes.get(component, ()))


def sd_scripts_has(name: str) -> bool:
    """Whether sd-scripts can have a module of this name. See `comfyui_has`."""
    encoder = re.match(r"lora_te[123]?_(?P<inner>.+)", name)
    if encoder:
        inner = encoder["inner"]
        is_layer = bool(re.match(r"text_model_encoder_layers_\d+_(self_attn_(q|k|v|out)_proj|mlp_fc[12])$", inner))
        return is_layer or inner.startswith("encoder_block_")  # T5 of FLUX and SD3
    # The prefix is required, and everything after it is flattened.
    inner = name.removeprefix("lora_unet_")
    if inner == name or "." in name or inner.startswith(("unet_", "text_model_", "single_transformer_blocks_")):
        return False
    flat_unet = _FLAT_UNET_ROOT.match(inner)
    return not _FLAT_CLIP.match(inner) and bool(not flat_unet or _FLAT_LAYERS.fullmatch(inner))


def file_name(keys: Iterable[str]) -> str | None:
    """The name of a module in its file, found from the keys of its update; None if ComfyUI knows none of these keys."""
    keys = list(keys)
    return next((found["name"] for key in keys if (found := _LEAF.match(key))), None)


def is_uso(keys: Iterable[str]) -> bool:
    """Whether a file has all of XLabs' names. ComfyUI renames only such a file (``convert_uso_lora``)."""
    return set(_USO) <= set(keys)
