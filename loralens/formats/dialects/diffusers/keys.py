"""Parsing the keys of a diffusers file, which has had four generations of names for the halves of a pair.

==========  ===================================================================  ==========================
style       key                                                                  module
==========  ===================================================================  ==========================
peft        ``unet.X.lora_A.weight``, ``unet.X.lora_A.NAME.weight``              ``unet.X``
bare        ``transformer.X.lora_A`` (Mochi)                                     ``transformer.X``
layer       ``unet.X.lora.down.weight``, ``text_encoder.X.lora_linear_layer.…``  the same
processor   ``X.processor.to_q_lora.down.weight``, ``…to_out_lora…``             ``unet.X.to_q``, ``….to_out.0``
processor   ``text_encoder.X.to_q_lora.down.weight``                             ``text_encoder.X.q_proj``
==========  ===================================================================  ==========================

A bias of B has the same names: ``lora_B.bias``, ``lora.up.bias``, ``to_q_lora.up.bias``.

Attention processors without a component belong to the UNet, because at that time only the UNet had them.
"""

import re
from collections.abc import Iterable

from loralens.core.image_names import LANGUAGE_MODEL
from loralens.formats.dialects.pairs import Leaf

COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
# The parts of a pair. PEFT has names of its own for the factors of an embedding.
HALVES = ("A", "B", "embedding_A", "embedding_B")
# Leaves of LyCORIS, by which its files are told from diffusers' and ComfyUI's.
LYCORIS = re.compile(r"\.(hada_\w+|lokr_\w+|oft_blocks|oft_diag|on_input|[ab][12]\.weight)$|[._]lora_mid\.weight$")

# style → the keys of its halves. No key fits two of them.
_STYLES = {
    "peft": re.compile(r"^(?P<path>.+)\.lora_(?P<half>[AB])(?:\.(?!weight$|bias$)[^.]+)?\.weight$"),
    "embedding": re.compile(r"^(?P<path>.+)\.lora_(?P<half>embedding_[AB])(?:\.[^.]+)?$"),
    "bare": re.compile(r"^(?P<path>.+)\.lora_(?P<half>[AB])$"),
    "layer": re.compile(r"^(?P<path>.+)\.lora(?:_linear_layer)?\.(?P<half>down|up)\.weight$"),
    "processor": re.compile(r"^(?P<path>.+\.(?:to_(?:q|k|v|out)|add_[qkv]_proj))_lora\.(?P<half>down|up)\.weight$"),
}
# part → the keys of tensors beside a pair, in all styles
_COMPANIONS = {
    "alpha": re.compile(r"^(?P<path>.+?)(?:\.lora|\.lora_linear_layer|_lora)?\.alpha$"),
    "magnitude": re.compile(r"^(?P<path>.+)\.(?:lora_magnitude_vector(?:\.weight)?|magnitude)$"),
    "lora_bias": re.compile(r"^(?P<path>.+?)(?:\.lora_B(?:\.[^.]+)?|\.lora(?:_linear_layer)?\.up|_lora\.up)\.bias$"),
}
_PARTS = {"down": "A", "up": "B"}
# The names of the processor's projections in CLIP and in the UNet.
_IN_TEXT_ENCODER = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_IN_UNET = {"to_out": "to_out.0"}
# The parts of a UNet, with which its paths begin if they have no component.
_UNET_ROOTS = ("down_blocks", "mid_block", "up_blocks")


def style(key: str) -> str | None:
    """The generation of names that a half of a pair is from; None for any other key."""
    return next((name for name, regex in _STYLES.items() if regex.match(key)), None)


def diffusers_leaf(key: str) -> Leaf | None:
    """The canonical name of the module and the part of a key; None for a key that diffusers does not write."""
    for name, regex in _STYLES.items():
        match = regex.match(key)
        if match:
            return Leaf(_module(match["path"], name), _PARTS.get(match["half"], match["half"]))
    for part, regex in _COMPANIONS.items():
        match = regex.match(key)
        if match:
            return Leaf(_module(match["path"], _style_beside(key)), part)
    return None


def _style_beside(key: str) -> str:
    """The generation of the pair that an α, a magnitude or a bias belongs to, as far as its own key tells."""
    stem = key.removesuffix(".alpha").removesuffix(".up.bias")
    if stem != key and stem.endswith("_lora"):
        return "processor"
    return "layer" if stem != key and stem.endswith((".lora", ".lora_linear_layer")) else "peft"


def component(name: str) -> str:
    """The component of the pipeline that a module belongs to; empty if its name does not say."""
    first, dot, _ = name.partition(".")
    return first if dot and first in COMPONENTS else ""


def _module(path: str, written: str) -> str:
    """The canonical name of a path that is stored in the style ``written``."""
    if written not in ("layer", "processor"):
        return path
    # In the old style, the processor of an attention held the factors.
    path = path.replace(".processor.", ".")
    first = path.partition(".")[0]
    # diffusers saved the first text encoder alone under CLIP's own names.
    if first == "text_model":
        path = f"text_encoder.{path}"
    elif first not in COMPONENTS and (written == "processor" or first in _UNET_ROOTS):
        path = f"unet.{path}"
    if written == "layer":
        return path
    # The processor's names of projections are not those of the layers.
    head, _, last = path.rpartition(".")
    in_text_encoder = path.startswith("text_encoder")
    return f"{head}.{(_IN_TEXT_ENCODER if in_text_encoder else _IN_UNET).get(last, last)}"


def are_diffusers_keys(keys: Iterable[str], *, declared: bool) -> bool:
    """Whether the style of all pairs is one of diffusers; ``declared`` says that the header names the dialect."""
    styles = {key: found for key in keys if (found := style(key))}
    return bool(styles) and all(_fits(key, found, declared=declared) for key, found in styles.items())


def _fits(key: str, key_style: str, *, declared: bool) -> bool:
    # The old styles are written by diffusers alone, apart from these prefixes of other programs.
    if key_style in ("layer", "processor"):
        return not key.startswith(("diffusion_model.", "lora_", "lycoris_"))
    if declared:
        return True
    # Without `.weight`, only Mochi's transformer is diffusers'; other files of this style are loralib's.
    if key_style == "bare":
        return key.startswith("transformer.") and not LANGUAGE_MODEL.match(key)
    return bool(component(key)) and not LANGUAGE_MODEL.match(key)
