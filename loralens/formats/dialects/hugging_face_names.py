"""Hugging Face's names for the modules of torchtune and LitGPT, which have names of their own for the same models."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from loralens.core.base_model import text_config
from loralens.core.model_in_memory import ModelPath
from loralens.core.names import some
from loralens.errors import LEAVE_OUT, MismatchError, place
from loralens.formats.dialects.gguf_architectures import Heads, architecture_of, heads_of

OTHER_BASE = "give the base that the adapter was trained on"
_LAYER = "model.layers.{}."
_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")


class Naming(NamedTuple):
    """The names of a program.

    Attributes
    ----------
    title : str
        The program in messages.
    names : mapping of str to str
        Its names → Hugging Face's, with ``{}`` for the number of the layer.
    families : mapping of str to bool
        Architectures (`ARCHITECTURES`) that it has under these names → whether it stores the two rows of a rotary pair
        of q and k beside each other.
    """

    title: str
    names: Mapping[str, str]
    families: Mapping[str, bool]


# As `hf_to_tune` of torchtune 0.6.1 and its variants for Qwen2 and Gemma 2 have them.
TORCHTUNE = Naming(
    "torchtune",
    {
        **{f"layers.{{}}.attn.{part}_proj": f"{_LAYER}self_attn.{part}_proj" for part in "qkv"},
        "layers.{}.attn.output_proj": f"{_LAYER}self_attn.o_proj",
        "layers.{}.mlp.w1": f"{_LAYER}mlp.gate_proj",
        "layers.{}.mlp.w2": f"{_LAYER}mlp.down_proj",
        "layers.{}.mlp.w3": f"{_LAYER}mlp.up_proj",
        "output": "lm_head",
    },
    {"llama": True, "gemma": True, "gemma2": True, "qwen2": False},
)
# As `convert_hf_checkpoint.py` of LitGPT 0.5.13 has them.
LITGPT = Naming(
    "LitGPT",
    {
        # The reader divides it into q_proj, k_proj and v_proj.
        **{f"transformer.h.{{}}.attn.{fused}": f"{_LAYER}self_attn.qkv_proj" for fused in ("qkv", "attn")},
        "transformer.h.{}.attn.proj": f"{_LAYER}self_attn.o_proj",
        "transformer.h.{}.mlp.fc_1": f"{_LAYER}mlp.gate_proj",
        "transformer.h.{}.mlp.fc_2": f"{_LAYER}mlp.up_proj",
        "transformer.h.{}.mlp.proj": f"{_LAYER}mlp.down_proj",
        "lm_head": "lm_head",
    },
    dict.fromkeys(("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"), False),
)


class Target(NamedTuple):
    """A base with Hugging Face's names.

    Attributes
    ----------
    names : mapping of str to str
        Module → its name in the base.
    heads : Heads
    head_size : int or None
        Number of rows of a head.
    permuted : bool
        Whether the rows of q and k have another order in the base than in the adapter.
    """

    names: Mapping[str, str]
    heads: Heads
    head_size: int | None
    permuted: bool


def target_of(naming: Naming, modules: Iterable[str], base: ModelPath | None) -> Target | None:
    """The names of modules in a base of Hugging Face; None without a base, or for one with the program's own names.

    Raises
    ------
    MismatchError
        Modules have no name in the base, or its config.json is not of a model whose names are known.
    """
    if base is None:
        return None
    from loralens.formats.models.checkpoint import model_config, shapes  # most adapters are read without a base

    names = {module: _renamed(module, naming) for module in modules}
    stored = {f".{key}" for key in shapes(base)}
    own = [f".{name}.weight" for name, new in names.items() if new != name]
    # Of names that the program does not have at all, the match with the base tells more.
    if not any(names.values()) or any(key.endswith(tuple(own)) for key in stored):
        return None
    with place(base):
        config = model_config(base)
        family, heads = architecture_of(config), heads_of(config)
        if family is None or family.name not in naming.families or heads is None:
            kind = text_config(config).get("model_type")
            what = (
                f"a base of type {kind!a:.40}" if kind else "a base without a config.json that has its type and heads"
            )
            raise MismatchError(
                f"the names of {naming.title}, such as {next(iter(names))}, are not known for {what}",
                fix=f"give the folder of a base of {', '.join(naming.families)}, or export the adapter for PEFT with "
                f"{naming.title}",
            )
    if unknown := [name for name, new in names.items() if new is None]:
        what = f"{len(unknown)} of {len(names)} modules have no known name in a model of Hugging Face: {some(unknown)}"
        raise MismatchError(what, fix=LEAVE_OUT)
    text = text_config(config)
    size, hidden = text.get("head_dim"), text.get("hidden_size")
    size = size or (hidden // heads.q if type(hidden) is int else None)
    renamed = {name: new for name, new in names.items() if new}
    return Target(renamed, heads, size, naming.families[family.name])


def _renamed(module: str, naming: Naming) -> str | None:
    new = naming.names.get(_NUMBER.sub("{}", module))
    number = _NUMBER.search(module)
    return new.format(number[0]) if new and number else new
