"""Names of modules: block, kind, natural order, and the nearest names. `loralens.core.selection` has the globs.

A module name is the dotted path of a weight in the base model: ``model.layers.11.self_attn.q_proj``. One expert of a
stack has its number in brackets behind it: ``model.layers.0.mlp.experts.gate_up_proj[3]``.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol, TypeVar

from loralens.errors import OptionError

_DIGITS = re.compile(r"([0-9]+)")  # not \d, which also matches the digits of other scripts
# Numbers of ten or more digits are not indices of blocks.
_NUMBER = re.compile(r"[0-9]{1,9}")
_EXPERT = re.compile(r"(?P<stack>.+)\[(?P<number>[0-9]{1,9})\]")
_EXPERT_ALONE = re.compile(r"(^|\.)experts\.\d+\.")


# Parts of names that wrappers insert: torch.compile, checkpointing of activations, FSDP 1.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class Block(NamedTuple):
    """The block of a model that contains a module, for example ``model.layers`` number 11."""

    stack: str
    number: int


class Expert(NamedTuple):
    """One expert of a stack: the name of the weight of the stack, and the number of the matrix in it."""

    stack: str
    number: int


def without_wrappers(name: str) -> str:
    """A dotted name without the parts that wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def natural_key(name: str) -> str:
    """A sort key that orders numbers by value: block 2 comes before block 10.

    The key is a string that is a few letters longer than the name. A tuple of parts would take fifty times the memory
    for names such as ``1.1.1.1…``.
    """
    return _DIGITS.sub(_number_key, name)


def _number_key(digits: re.Match[str]) -> str:
    """A text that sorts a number by its length, its digits and its leading zeros, in this order.

    int() is not used because it refuses more than 4300 digits. The letter that ends each part sorts before all others,
    so shorter parts come first.
    """
    number = digits[0].lstrip("0")
    # The length sorts numbers without leading zeros by size.
    return f"\0{chr(1 + len(number))}{number}\0{digits[0]}\0"


def block(name: str) -> Block | None:
    """The block of a module: the path up to its first number, and that number; None outside any block."""
    path, joint = _split_name(name)
    for i, part in enumerate(path):
        if (i or joint == ".") and _NUMBER.fullmatch(part):
            return Block(joint.join(path[:i]), int(part))
    return None


def kind(name: str) -> str:
    """The last part of a module name: ``q_proj``, ``to_out.0``, ``gate_up_proj`` of one expert of a stack.

    A number that ends the name belongs to the kind, unless it is the block's: the kind of ``w_018`` is ``w``.
    """
    path, joint = _split_name(weight_name(name))
    # kohya's names have no dots; what follows the last inner number is the kind.
    if joint == "_":
        # A number at the end belongs to the kind (`to_out_0`), and a number at the beginning does not name a block.
        inner = [i for i, part in enumerate(path[:-1]) if i and _NUMBER.fullmatch(part)]
        return joint.join(path[inner[-1] + 1 :] if inner else path[:-1])
    start = len(path) - 1
    # `to_out.0`: numbers that end a name count the layers of a sequence, and the part before them names the kind.
    while start and path[start].isdecimal():
        start -= 1
    # `w_018` or `w.018`: the number counts modules and is not part of the kind.
    alone = start == 0 and len(path) == 2
    return path[0] if alone and path[1].isdecimal() else joint.join(path[start:])


def kind_in_block(name: str) -> str:
    """The path of a module behind its last number, joined by underscores: ``self_attn_q_proj``, ``attn1_to_out_0``.

    It is finer than `kind`, which is ``to_q`` for self-attention and for cross-attention alike. It is the same for
    dialects that join names by dots and by underscores. Numbers that end the name belong to the kind if there is a
    block before them. Without a block they count the modules: the kind of ``w_018`` is ``w``.
    """
    path = re.split(r"[._]", weight_name(name))
    last = len(path)
    # Numbers at the end do not divide the name from its block.
    while last and _NUMBER.fullmatch(path[last - 1]):
        last -= 1
    inner = [i for i in range(last) if _NUMBER.fullmatch(path[i])]
    return "_".join(path[inner[-1] + 1 :] if inner else path[:last] or path)


def expert(name: str) -> Expert | None:
    """The stack and number of a module that is one expert of a stack; None for any other module."""
    # Nearly no module is one, and each is asked for its kind many times.
    parts = _EXPERT.fullmatch(name) if name.endswith("]") else None
    return Expert(parts["stack"], int(parts["number"])) if parts else None


def weight_name(name: str) -> str:
    """The name of the weight that a module adapts, which is that of the stack if the module is one of its experts."""
    expert_parts = expert(name)
    return expert_parts.stack if expert_parts else name


def _split_name(name: str) -> tuple[list[str], str]:
    """Split a name at its dots, or at its underscores if it has numbers but no dots, as in kohya's names."""
    if "." in name:
        return name.split("."), "."
    path = name.split("_")
    # Without a number, underscores may belong to the name itself: `q_proj`.
    if any(i and _NUMBER.fullmatch(part) for i, part in enumerate(path)):
        return path, "_"
    return [name], "."


def is_expert_alone(name: str) -> bool:
    """Whether a module belongs to an expert that is stored separately: ``model.layers.0.mlp.experts.3.w1``."""
    return bool(_EXPERT_ALONE.search(name))


_CONVOLUTION = re.compile(r"(?<!pw)conv(?!e)|patch_embed|downsample", re.IGNORECASE)


def is_convolution_name(name: str) -> bool:
    """Whether a module is probably a convolution by its name: ``conv1``, ``downsample.0``, ``patch_embed.proj`` …"""
    return bool(_CONVOLUTION.search(".".join(name.split(".")[-2:])))


def some(names: Iterable[str], count: int = 3) -> str:
    """The first ``count`` names and the number of the others, as text for a message."""
    names = list(names)
    remainder = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + remainder if names else "nothing"


class Named(Protocol):
    """A row of a table that can be found by its name."""

    @property
    def name(self) -> str:
        """The name of the row."""
        ...


Row = TypeVar("Row", bound=Named)


def row_named(name: str, rows: Sequence[Row], what: str) -> Row:
    """The row of a table that has this name; ``what`` names the rows in the message.

    Raises
    ------
    OptionError
        No row has this name.
    """
    for row in rows:
        if row.name == name:
            return row
    names = [row.name for row in rows]
    raise OptionError(
        f"{name!r} is not a {what}", fix=f"choose one of {', '.join(names)}; nearest: {nearest(name, names, 1)}"
    )


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """The ``count`` names that are most similar to ``name``, as text for a message."""
    # No cutoff: a distant name still shows in which style the names are written.
    close = _similar(name, names, count, cutoff=0.0)
    return ", ".join(close) if close else "none: there are no modules"


def is_near(name: str, names: Iterable[str]) -> bool:
    """Whether ``name`` may be one of ``names`` with a spelling mistake."""
    # 0.6 is the default of difflib: q_porj is near q_proj (0.83), and text_encoder is not near to_out (0.22).
    return bool(_similar(name, names, 1, cutoff=0.6))


def _similar(name: str, names: Iterable[str], count: int, *, cutoff: float) -> list[str]:
    from difflib import get_close_matches  # only when something is wrong

    names = list(names)
    # Kinds are offered too, because a glob or an option may name one. Sorted, so that ties are resolved alike.
    return get_close_matches(name, sorted({*names, *map(kind, names)}, key=natural_key), n=count, cutoff=cutoff)


_ENCODER = re.compile(  # prefixes that state that a module is in a text encoder, and in which one
    r"^(?:lora_(?:prior_)?te(?P<kohya>\d?)_"
    r"|text_encoder(?:_(?P<diffusers>\d))?\."
    r"|text_encoders\.(?P<comfyui>clip_[lhg]|t5xxl)\.transformer\.)"
)


def encoder_prefix(name: str) -> str:
    """The beginning of a name that states the text encoder of the module; empty for other modules."""
    found = _ENCODER.match(name)
    return found[0] if found else ""


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
