"""XLabs' adapters for FLUX, which are attention processors of Black Forest Labs' own implementation.

==============================================  =======================================================
stored                                          the weight it adapts
==============================================  =======================================================
``double_blocks.N.processor.qkv_lora1``         ``double_blocks.N.img_attn.qkv`` (1 image, 2 text)
``double_blocks.N.processor.proj_lora2``        ``double_blocks.N.txt_attn.proj``
``single_blocks.N.processor.qkv_lora``          ``single_blocks.N.linear1``: its first 3·h rows of 7·h
``single_blocks.N.processor.proj_lora``         ``single_blocks.N.linear2``
==============================================  =======================================================

A is ``down.weight`` (r, in), B is ``up.weight`` (out, r), and the scale is 1 by definition. ``linear1`` computes q, k,
v and the input of the MLP together. B gets rows of zeros for the MLP: as many as ``linear2`` has inputs besides the h
of the attention. The file shows this number if it adapts ``linear2`` too; otherwise it is 4·h, as in every FLUX.1.
"""

import re
from collections.abc import Mapping

import numpy as np

from loralens.core.adapter import Adapter, Finding
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank, Scaling
from loralens.errors import ShapeError
from loralens.formats.dialects import pairs
from loralens.formats.dialects.pairs import SAVE_AGAIN, Leaf, Parts
from loralens.formats.files.container import Stored

NAME = "xlabs"
RATIO = 4  # the width of the MLP divided by that of the model, in FLUX.1
MOST = 16  # the largest ratio that is accepted, so that a small file cannot ask for a huge matrix of zeros

# double_blocks.0.processor.qkv_lora1.down.weight, perhaps under diffusion_model.
_HALF = re.compile(
    r"^(?P<block>(?:diffusion_model\.)?(?:double_blocks|single_blocks)\.\d+)\.processor\."
    r"(?P<layer>(?:qkv|proj)_lora[12]?)\.(?P<half>down|up)\.weight$"
)
# kind of block and layer of the processor → weight of the block
_WEIGHTS = {
    ("double_blocks", "qkv_lora1"): "img_attn.qkv",
    ("double_blocks", "qkv_lora2"): "txt_attn.qkv",
    ("double_blocks", "proj_lora1"): "img_attn.proj",
    ("double_blocks", "proj_lora2"): "txt_attn.proj",
    ("single_blocks", "qkv_lora"): "linear1",
    ("single_blocks", "proj_lora"): "linear2",
}
_PARTS = {"down": "A", "up": "B"}


def xlabs_leaf(key: str) -> Leaf | None:
    """The weight and the half that a key names; None for a key that XLabs' processors do not have."""
    match = _HALF.match(key)
    if not match:
        return None
    weight = _WEIGHTS.get((match["block"].split(".")[-2], match["layer"]))
    return Leaf(f"{match['block']}.{weight}", _PARTS[match["half"]]) if weight else None


def detect(stored: Stored) -> bool:
    """Whether a file has pairs of XLabs' processors and no other pairs."""
    half_keys = [key for key in stored.tensors if key.endswith((".down.weight", ".up.weight"))]
    # A file that has other pairs, or LoRA of another style besides, is not XLabs' alone.
    return bool(half_keys) and all(map(xlabs_leaf, half_keys)) and not any(".lora_" in key for key in stored.tensors)


def read(stored: Stored) -> Adapter:
    """The adapter of an XLabs file.

    Raises
    ------
    FormatError, ShapeError
        One half of a pair is missing, or factors do not fit together.
    """
    groups, unpaired = pairs.group(stored.tensors, xlabs_leaf)
    modules = pairs.unfold(groups, lambda name, parts: [(name, _module(name, parts, groups))])
    findings = _about_widths(groups) + pairs.unread_findings(list(unpaired))
    return pairs.make_adapter(stored, NAME, modules, pairs.unpaired_extras(unpaired), findings)


def _module(name: str, parts: Parts, groups: Mapping[str, Parts]) -> LowRank:
    B, A = pairs.factors(parts)
    # Only this weight is larger than what XLabs' processor adapts: it has the rows of the MLP, which are as many as
    # the inputs of linear2 without those of the attention.
    if name.endswith(".linear1"):
        second, width = _second(name, groups), A.shape[1]
        B = _pad(B, width, RATIO * width if second is None else second.shape[1] - width)
    scaling = Scaling("given", origin="XLabs has no alpha: scale 1")
    return LowRank(B, A, scaling=scaling, origin=pairs.origin_of(NAME, parts))


def _second(name: str, groups: Mapping[str, Parts]) -> LazyArray | None:
    """The factor A (r, in) of ``linear2`` in the same block; None if the file does not adapt it."""
    parts = groups.get(f"{name.removesuffix('linear1')}linear2", {})
    return parts["A"][1] if "A" in parts and parts["A"][1].ndim == 2 else None


def _pad(B: LazyArray, width: int, rows: int) -> LazyArray:
    """B (3·width, r) with rows of zeros below it."""
    # The attention of FLUX is as wide as the model, so q, k and v have 3 · h rows.
    if B.shape[0] != 3 * width or not 0 <= rows <= MOST * width:
        what = f"B {B.shape} of q, k and v, and {rows} rows of an MLP, do not fit a model {width} wide"
        raise ShapeError(what, fix=SAVE_AGAIN)
    return B.map(lambda array: np.pad(array, ((0, rows), (0, 0))), shape=(B.shape[0] + rows, B.shape[1]))


def _about_widths(groups: Mapping[str, Parts]) -> list[Finding]:
    """A finding about widths that were taken from FLUX.1 because the file does not show them."""
    assumed = [name for name in groups if name.endswith(".linear1") and _second(name, groups) is None]
    if not assumed:
        return []
    text = (
        f"{len(assumed)} updates of linear1 (the first is {assumed[0]}) are padded with zeros to 7 times as many rows "
        "as the model is wide, as in FLUX.1"
    )
    return [Finding("note", "width-assumed", text)]
