"""The names and the division of a model's weights in memory, on disk and in other software.

transformers 5 keeps all experts of a layer in one tensor, with the rows of gate and up below each other, and saves them
one by one. It also saves many models with names that differ from those of their modules. An adapter names modules, and
a base names stored tensors. Both are mapped to `MatrixSlot`s here; a slot is one matrix of the network under one name.

The names come from transformers 5.24 (``conversion_mapping.py``) and mlx-lm (``sanitize`` of its models).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, final

from loralens.core.names import expert

Shape = tuple[int, ...]

RENAMED = (  # expression → its replacement in the common spelling; applied in this order
    # A language model inside a model of images and text stands one level higher or lower.
    (r"^(?:(?:model|language_model|backbone)\.)+", ""),
    (r"\b(vision_tower|image_tower|video_tower)\.vision_model\.", r"\1."),
    # Mixtral, Phi-3.5-MoE, MiniMax: ``block_sparse_moe`` on disk and ``mlp`` in memory.
    (r"\.block_sparse_moe\.", ".mlp."),
    # The router: ``gate`` of Mixtral and Qwen, ``router.layer`` of Granite on disk.
    (r"\.(mlp|feed_forward|ffn)\.(?:gate|router\.gate|router\.layer)$", r".\1.router"),
    # The head of GPT-NeoX on disk.
    (r"^embed_out$", "lm_head"),
    # mlx-lm, and Granite on disk.
    (r"\.switch_mlp\.", ".experts."),
    (r"\.mlp\.input_linear$", ".mlp.experts.gate_up_proj"),
    (r"\.mlp\.output_linear$", ".mlp.experts.down_proj"),
    # ViT and the models built like it, DINOv2, Swin.
    (r"(^|\.)encoder\.layer\.(\d+)\.", r"\1layers.\2."),
    (r"\.attention\.(?:attention|self)\.(query|key|value)$", lambda parts: f".attention.{parts[1][0]}_proj"),
    (r"\.attention\.output\.dense$", ".attention.o_proj"),
    (r"\.intermediate\.dense$", ".mlp.fc1"),
    (r"\.output\.dense$", ".mlp.fc2"),
    (r"\.mlp\.weights_out$", ".mlp.down_proj"),
)  # fmt: skip
EXPERT_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # Mixtral's names → those of all others
FUSED = (  # end of a name → the ends of the names of its parts, in the order of the rows; parts have the same size
    (".experts.gate_up_proj", (".experts.gate_proj", ".experts.up_proj")),
    (".mlp.weights_in", (".mlp.gate_proj", ".mlp.up_proj")),  # DINOv2 with SwiGLU
)
_EXPERT_ALONE = re.compile(r"^(?P<stack>.+\.experts)\.(?P<number>\d{1,9})\.(?P<part>\w+)$")
_RENAMED = tuple((re.compile(expression), new) for expression, new in RENAMED)


class MatrixSlot(NamedTuple):
    """One matrix of a network: its name in the common spelling, and the number of its expert."""

    name: str
    expert: int | None = None


class Place(NamedTuple):
    """The location of a slot in the base.

    Attributes
    ----------
    key : str
        The key of the tensor in the base.
    number : int or None
        The number of the matrix, if the tensor is a stack.
    part, parts : int
        The slot is part number ``part`` of ``parts`` equal parts of the outputs of that matrix.
    """

    key: str
    number: int | None = None
    part: int = 0
    parts: int = 1


# Large checkpoints with separate experts have tens of thousands of tensors, and each name is read several times.
@lru_cache(maxsize=1 << 17)
def slots(name: str) -> tuple[MatrixSlot, ...]:
    """The slots of a module, or of a stored tensor without its ``.weight``, in the order of its outputs."""
    number, path = None, name
    alone, stacked = _EXPERT_ALONE.match(name), expert(name)
    if stacked:
        path, number = stacked
    elif alone:
        part = EXPERT_PARTS.get(alone["part"], alone["part"])
        path, number = f"{alone['stack']}.{part}", int(alone["number"])
    # In order: `.attention.output.dense` has to be replaced before the shorter `.output.dense`.
    for expression, new in _RENAMED:
        path = expression.sub(new, path)
    for end, parts in FUSED:
        if path.endswith(end):
            return tuple(MatrixSlot(path.removesuffix(end) + part, number) for part in parts)
    return (MatrixSlot(path, number),)


@final
class Storage:
    """The slots of a base and their locations.

    Parameters
    ----------
    base : mapping of str to tuple of int
        Key → shape of every tensor.
    """

    __slots__ = ("_base", "_places")

    def __init__(self, base: Mapping[str, Shape]) -> None:
        self._base = base
        self._places: dict[MatrixSlot, list[Place]] = {}
        for key in base:
            tensor_slots = slots(key.removesuffix(".weight"))
            for part, slot in enumerate(tensor_slots):
                self._places.setdefault(slot, []).append(Place(key, None, part, len(tensor_slots)))

    @property
    def names(self) -> Mapping[str, Shape]:
        """The name of every slot → the shape of a tensor that contains it."""
        return {slot.name: self._base[places[0].key] for slot, places in self._places.items()}

    def places(self, module_slots: Sequence[MatrixSlot]) -> tuple[Place, ...]:
        """The places in which these slots of one module are stored; empty if a slot has no place, or several."""
        slot_places = [self._place(slot) for slot in module_slots]
        places = tuple(place for place in slot_places if place is not None)
        # A module without one of its parts cannot be adapted.
        if len(places) < len(module_slots):
            return ()
        first = places[0]
        # All parts of one tensor in their order are the tensor itself.
        if places == tuple(first._replace(part=part, parts=len(places)) for part in range(len(places))):
            return (Place(first.key, first.number),)
        return places

    def _place(self, slot: MatrixSlot) -> Place | None:
        candidates = self._places.get(slot, [])
        # The name of a stack does not contain the number of an expert. Only a tensor with three axes can be a stack.
        if not candidates and slot.expert is not None:
            stacks = self._places.get(MatrixSlot(slot.name), [])
            candidates = [p._replace(number=slot.expert) for p in stacks if len(self._base[p.key]) == 3]
        # With two candidates the name does not decide, so the slot has no place.
        return candidates[0] if len(candidates) == 1 else None


def is_interleaved(key: str, base: Iterable[str]) -> bool:
    """Whether gate and up alternate in a stored stack, as in gpt-oss, which is recognised by the biases of experts."""
    return key.endswith("experts.gate_up_proj") and f"{key}_bias" in base
