"""Normal form: a module's name without its dialect, and which of a pipeline's text encoders it speaks of."""

import re
from functools import lru_cache

_ENCODER = re.compile(  # what says that a module lies in a text encoder, and in which
    r"^(?:lora_(?:prior_)?te(?P<kohya>\d?)_"
    r"|text_encoder(?:_(?P<diffusers>\d))?\."
    r"|text_encoders\.(?P<comfyui>clip_[lhg]|t5xxl)\.transformer\.)"
)
_COMFYUI = {"clip_g": 2}  # clip_l, and clip_h of Stable Diffusion 2, are the first
# More names than any model has; a bound, because names come from files.
CACHED = 1 << 16  # names; matching reads those of a base several times
_T5 = re.compile(r"^encoder[._]block[._]\d+[._]layer[._]")
_PREFIXES = (
    "lora_unet_unet_", "lora_unet__", "lora_unet_", "lora_transformer_", "lora_prior_unet_", "lycoris_",
    "diffusion_model.", "model.diffusion_model.", "transformer.", "unet.", "text_encoders.", "base_model.model.",
)  # fmt: skip


def normal_form(name: str) -> str:
    """A name with its component's prefix stripped and ``.`` and ``/`` written as ``_``.

    What lies in a text encoder after the first keeps the number: ``te2_``.
    """
    number = encoder(name)
    return f"te{number}_{inner_form(name)}" if number > 1 else inner_form(name)


@lru_cache(maxsize=CACHED)
def encoder(name: str) -> int:
    """Which text encoder of a pipeline a name states, from 1; 0 where it states none.

    T5 counts as none: it is the second of FLUX and the third of Stable Diffusion 3, always ``lora_te3_`` for kohya, and
    no other encoder has layers of these names.
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
    prefix = stated[0] if stated else next((one for one in _PREFIXES if name.startswith(one)), "")
    return re.sub(r"[./]", "_", name[len(prefix) :])


def bare_form(name: str) -> str:
    """`inner_form` without ``text_model`` or ``vision_model``, which CLIP's own models lost in transformers 5."""
    return inner_form(name).removeprefix("text_model_").removeprefix("vision_model_")


def may_be_same(name: str, other: str) -> bool:
    """Whether two names may be one module as far as text encoders go: both of the same, or one states none."""
    return encoder(name) == encoder(other) or not (encoder(name) and encoder(other))
