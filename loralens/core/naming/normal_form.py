"""The normal form of a module name, which is the same in all dialects, and the text encoder that a name states."""

import re
from functools import lru_cache

_ENCODER = re.compile(  # prefixes that state that a module is in a text encoder, and in which one
    r"^(?:lora_(?:prior_)?te(?P<kohya>\d?)_"
    r"|text_encoder(?:_(?P<diffusers>\d))?\."
    r"|text_encoders\.(?P<comfyui>clip_[lhg]|t5xxl)\.transformer\.)"
)
# SDXL has clip_l and clip_g. clip_h is the only encoder of Stable Diffusion 2.
_COMFYUI = {"clip_g": 2}  # clip_l and clip_h are the first
# More names than any model has; a bound, because names come from files.
CACHED = 1 << 16  # names in each cache, since matching uses the names of a base several times
_T5 = re.compile(r"^encoder[._]block[._]\d+[._]layer[._]")
_PREFIXES = (
    "lora_unet_unet_", "lora_unet__", "lora_unet_", "lora_transformer_", "lora_prior_unet_", "lycoris_",
    "diffusion_model.", "model.diffusion_model.", "transformer.", "unet.", "text_encoders.", "base_model.model.",
)  # fmt: skip


def normal_form(name: str) -> str:
    """A name without the prefix of its component, and with ``.`` and ``/`` written as ``_``.

    Modules in the second and later text encoders keep the number of the encoder: ``te2_``.
    """
    # The first encoder needs no number: in models with one encoder, names often have none.
    number = encoder(name)
    return f"te{number}_{inner_form(name)}" if number > 1 else inner_form(name)


@lru_cache(maxsize=CACHED)
def encoder(name: str) -> int:
    """The number of the text encoder that a name states, from 1; 0 if it states none.

    T5 counts as none. It is the second encoder of FLUX and the third of Stable Diffusion 3, kohya always calls it
    ``lora_te3_``, and no other encoder has layers of these names.
    """
    stated = _ENCODER.match(name)
    if not stated or _T5.match(name[stated.end() :]):
        return 0
    if stated["comfyui"]:
        # An encoder of another name counts as the first.
        return _COMFYUI.get(stated["comfyui"], 1)
    return int(stated["kohya"] or stated["diffusers"] or 1)


@lru_cache(maxsize=CACHED)
def inner_form(name: str) -> str:
    """The normal form without the number of a text encoder."""
    stated = _ENCODER.match(name)
    # Longer prefixes stand before their own beginnings in `_PREFIXES`.
    prefix = stated[0] if stated else next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    return re.sub(r"[./]", "_", name[len(prefix) :])


def bare_form(name: str) -> str:
    """`inner_form` without ``text_model`` or ``vision_model``, which CLIP's own models lost in transformers 5."""
    return inner_form(name).removeprefix("text_model_").removeprefix("vision_model_")


def may_be_same(name: str, other: str) -> bool:
    """Whether two names may belong to the same text encoder: they state the same one, or one of them states none."""
    return encoder(name) == encoder(other) or not (encoder(name) and encoder(other))
