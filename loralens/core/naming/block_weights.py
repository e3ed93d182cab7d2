"""Weights for the blocks of SD, SDXL and FLUX.1, as the LoRA block weight tools of A1111 and ComfyUI write them.

The names of blocks, their order, the lengths of vectors and the presets are those of sd-webui-lora-block-weight
(``scripts/lora_block_weight.py``) and of the Inspire Pack of ComfyUI (``inspire/lora_block_weight.py`` and
``resources/lbw-preset.txt``). Blocks are counted in the original checkpoint:

==========  =================================================================================
SD, SDXL    ``BASE`` (text encoders and everything outside of blocks), ``IN00``…, ``MID``
            (``M00`` in A1111), ``OUT00``…; ``MID0`` to ``MID2`` are the layers of ``MID``
FLUX        ``CLIP``, ``T5``, ``IN``, ``D00``… (double blocks), ``S00``… (single blocks), ``OUT``
==========  =================================================================================
"""

import re
from collections.abc import Mapping, Sequence
from math import isfinite

from loralens.core.names import nearest
from loralens.core.naming.image_models import ImageModel, Layer
from loralens.errors import OptionError

Weights = str | Mapping[str, float] | Sequence[float]
_NUMBERED = (  # beginning of an original name → the letters of its blocks
    ("input_blocks.", "IN"),
    ("output_blocks.", "OUT"),
    ("double_blocks.", "D"),
    ("single_blocks.", "S"),
)
_ALIASES = {"M00": "MID", "M": "MID", "DOUBLE": "D", "SINGLE": "S"}
_EVERYTHING = ("ALL", "DEFAULT")
_ENTRY = re.compile(r"^(?P<first>[A-Z]+\d*|T5)(?:-(?P<last>[A-Z]*\d+))?$")


def _numbers(letters: str, *numbers: int) -> list[str]:
    return [f"{letters}{number:02}" for number in numbers]


_SD_17 = ["BASE", *_numbers("IN", 1, 2, 4, 5, 7, 8), "MID", *_numbers("OUT", *range(3, 12))]
_SD_26 = ["BASE", *_numbers("IN", *range(12)), "MID", *_numbers("OUT", *range(12))]
_SD_27 = ["BASE", *_numbers("IN", *range(1, 12)), "MID0", "MID1", "MID2", *_numbers("OUT", *range(12))]
_XL_12 = ["BASE", *_numbers("IN", 4, 5, 7, 8), "MID", *_numbers("OUT", *range(6))]
_XL_20 = ["BASE", *_numbers("IN", *range(9)), "MID", *_numbers("OUT", *range(9))]
_XL_21 = ["BASE", *_numbers("IN", *range(1, 9)), "MID0", "MID1", "MID2", *_numbers("OUT", *range(9))]
_DOUBLE, _SINGLE = _numbers("D", *range(19)), _numbers("S", *range(38))
# For each family, the blocks of each vector, which is recognised by its length. Blocks that a vector does not list get
# 0, as in A1111. With a vector of 20, single blocks get the weight of the last double block, as in the Inspire Pack.
VECTORS: dict[str, tuple[list[str], ...]] = {
    "SD": (_SD_17, _SD_26, _SD_27),
    "SDXL": (_XL_12, _XL_20, _XL_21),
    "FLUX": (
        ["BASE", *_DOUBLE],
        ["BASE", *_DOUBLE, *_SINGLE],
        ["CLIP", "T5", "IN", *_DOUBLE, *_SINGLE, "OUT"],
    ),
}
# name → weights of BASE and of the blocks of the shortest vector in their order, or of blocks by name
PRESETS: dict[str, dict[str, str]] = {
    "SD": {
        "NONE": "ALL=0",
        "ALL": "ALL=1",
        "ALL0.5": "ALL=0.5",
        "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
        "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
        "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
        "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
        "MIDD0.2": "1,0,0,0,0,0,0.2,0.4,0.4,0.2,0,0,0,0,0,0,0",
        "MIDD0.8": "1,0,0,0,0,0.5,0.8,0.8,0.4,0,0,0,0,0,0,0,0",
        "MOUT": "1,0,0,0,0,0,1,1,1,1,1,1,1,1,0.5,0,0",
        "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
        "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
        "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    },
    "SDXL": {
        "NONE": "ALL=0",
        "ALL": "ALL=1",
        "INALL": "1,1,1,1,1,0,0,0,0,0,0,0",
        "MIDALL": "1,0,0,0,0,1,0,0,0,0,0,0",
        "OUTALL": "1,0,0,0,0,0,1,1,1,1,1,1",
    },
    "FLUX": {
        "NONE": "ALL=0",
        "ALL": "ALL=1",
        "DBL-ALL": "ALL=1",
        "DBL-FRONT7": "ALL=0,BASE=1,D00-D06=1",
        "DBL-MID6": "ALL=0,BASE=1,D07-D12=1",
        "DBL-TAIL6": "ALL=0,BASE=1,D13-D18=1,S=1",
        "SINGLE-ALL": "ALL=1,D=0",
        "SINGLE-1TO10": "ALL=0,BASE=1,S00-S09=1",
        "SINGLE-11TO20": "ALL=0,BASE=1,S10-S19=1",
        "SINGLE-21TO30": "ALL=0,BASE=1,S20-S29=1",
        "SINGLE-31TO37": "ALL=0,BASE=1,S30-S37=1",
    },
}


def family(model: ImageModel) -> str:
    """The family of a model, which has its own block names and presets: ``SD``, ``SDXL`` or ``FLUX``."""
    return {"SDXL": "SDXL", "FLUX.1": "FLUX"}.get(model.name, "SD")


def layer_block_names(layer: Layer) -> tuple[str, ...]:
    """The names of the block that a layer belongs to, the smallest block first: ``MID1``, ``MID``."""
    component, _, inner = layer.original.partition(".")
    flux = layer.name.startswith("transformer.")
    for start, letters in _NUMBERED:
        if inner.startswith(start):
            return (f"{letters}{int(inner.split('.')[1]):02}",)
    if inner.startswith("middle_block."):
        return f"MID{inner.split('.')[1]}", "MID"
    if component == "text_encoders":
        return ("T5" if inner.startswith("t5xxl.") else "CLIP", "BASE")
    if not flux:
        return ("BASE",)
    return ("OUT" if inner.startswith("final_layer.") else "IN", "BASE")


def weights_of_modules(
    model: ImageModel, layers: Mapping[str, Layer], *, preset: str | None = None, blocks: Weights | None = None
) -> dict[str, float]:
    """The weight of each module.

    Parameters
    ----------
    model : ImageModel
    layers : mapping of str to Layer
        Module → the layer that it adapts, or the first of them.
    preset : str, optional
        The name of a row of `PRESETS`, with or without the name of its family before it.
    blocks : str, mapping or sequence of float, optional
        ``IN04=0,MID=1``, a mapping with the same names, or all weights in their order. They come after the preset.

    Raises
    ------
    OptionError
        A preset or a block that the model does not have, a vector of another length, or a weight that is not a number.
    """
    names = {module: layer_block_names(layer) for module, layer in layers.items()}
    # Every name of a block of the model → the smallest blocks that it contains.
    inside: dict[str, list[str]] = {}
    for own in dict.fromkeys(map(layer_block_names, model.layers)):
        for name in own:
            inside.setdefault(name, []).append(own[0])
    present = sorted({own[0] for own in names.values()})
    weights: dict[str, float] = {}
    for text in (None if preset is None else _preset(preset, family(model)), blocks):
        if text is not None:
            weights |= _parse(text, family(model), inside, present)
    return {module: weights.get(own[0], 1.0) for module, own in names.items()}


def _preset(name: str, kin: str) -> str:
    table = PRESETS[kin]
    # The Inspire Pack writes the family before the name: SDXL-INALL.
    weights = table.get(name.upper().removeprefix(f"{kin}-"))
    if weights is None:
        fix = f"choose one of {', '.join(table)}"
        raise OptionError(f"--preset {name!r} is not a preset for {kin}", fix=fix)
    return weights


def _parse(blocks: Weights, kin: str, inside: Mapping[str, list[str]], present: Sequence[str]) -> dict[str, float]:
    """The weight of every block that is named; a block that contains others is replaced by these."""
    entries: Sequence[tuple[str, object]]
    if isinstance(blocks, Mapping):
        entries = [(str(name), value) for name, value in blocks.items()]
    elif isinstance(blocks, str) and "=" in blocks:
        entries = [_split(entry) for entry in blocks.lstrip("% ").split(",") if entry.strip()]
    else:
        # The tools write the name of a preset before its vector: OUTALL:1,0,0…
        numbers = blocks.rpartition(":")[2].split(",") if isinstance(blocks, str) else blocks
        if isinstance(blocks, str) and len(numbers) == 1:
            # Every vector has more numbers. `IN04:0` is meant as the weight of one block.
            raise OptionError(f"--block-weights has {blocks!r:.40}, which is not BLOCK=WEIGHT", fix="IN04=0, ALL=0.5")
        entries = _vector([_number(number) for number in numbers], kin, inside)
    counted = isinstance(blocks, str) and blocks.lstrip().startswith("%")
    weights: dict[str, float] = {}
    # An entry for all blocks is applied first, wherever it is written, so that the others are exceptions to it.
    for name, value in sorted(entries, key=lambda entry: entry[0].upper() not in _EVERYTHING):
        chosen = _blocks_by_number(name, present) if counted else _chosen(name, list(inside))
        weights |= dict.fromkeys((block for own in chosen for block in inside[own]), _number(value))
    return weights


def _split(entry: str) -> tuple[str, str]:
    name, equals, value = entry.partition("=")
    if not equals:
        raise OptionError(f"--block-weights has {entry.strip()!r}, which is not BLOCK=WEIGHT", fix="IN04=0,MID=1")
    return name.strip(), value


def _number(value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = float("nan")
    if not isfinite(number):
        text = str(value).strip()
        random = ": random weights (R, U) and those of sliders (A, B) are not taken" if text.upper() in "RUAB" else ""
        raise OptionError(f"--block-weights has {text!r:.40}, which is not a number{random}", fix="IN04=0,MID=1")
    return number


def _vector(numbers: Sequence[float], kin: str, inside: Mapping[str, list[str]]) -> list[tuple[str, float]]:
    """The blocks and their weights in a vector, preceded by the blocks that it does not list."""
    blocks = next((blocks for blocks in VECTORS[kin] if len(blocks) == len(numbers)), None)
    if blocks is None:
        lengths = ", ".join(str(len(blocks)) for blocks in VECTORS[kin])
        what = f"--block-weights has {len(numbers)} numbers, and vectors for {kin} have {lengths}"
        raise OptionError(what, fix="give all numbers of a vector, or blocks by name: BASE=1,OUT=0.5")
    listed = list(zip(blocks, numbers, strict=True))
    if kin == "FLUX":
        return [(name, numbers[len(_DOUBLE)]) for name in _SINGLE] + listed
    return [(name, 0.0) for name in inside if name.startswith(("IN", "OUT"))] + listed


def _chosen(text: str, model_blocks: Sequence[str]) -> list[str]:
    """The blocks that an entry names: one, a range, or all whose names begin with letters."""
    name = text.upper()
    if name in _EVERYTHING:
        return list(model_blocks)
    name = _ALIASES.get(name, name)
    match = _ENTRY.match(name)
    if match and match["last"]:
        letters = match["first"].rstrip("0123456789")
        first, last = (
            _pad(match["first"]),
            _pad(letters + match["last"].lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")),
        )
        if first in model_blocks and last in model_blocks:
            start, stop = sorted((model_blocks.index(first), model_blocks.index(last)))
            return [each for each in model_blocks[start : stop + 1] if each.startswith(letters)]
    for exact in (name, _pad(name)):
        if exact in model_blocks:
            return [exact]
    group = [each for each in model_blocks if match and not match["last"] and each.rstrip("0123456789") == name]
    if group:
        return group
    raise OptionError(f"--block-weights: no block {text!r}", fix=f"the nearest are {nearest(name, model_blocks)}")


def _pad(name: str) -> str:
    """The name of a block with two digits: IN4 is IN04."""
    letters = name.rstrip("0123456789")
    digits = name[len(letters) :]
    return f"{letters}{int(digits):02}" if letters in ("IN", "OUT", "D", "S") and digits else name


def _blocks_by_number(text: str, model_blocks: Sequence[str]) -> list[str]:
    """The blocks of an entry of the Inspire Pack's ``%`` form, whose numbers count the blocks that the adapter has."""
    match = re.match(r"^(default|base|in|mid|out|double|single)(\d+)?(?:-(\d+))?$", text.lower())
    if not match:
        raise OptionError(
            f"--block-weights: no block {text!r}",
            fix="give blocks and weights such as %default=1,in1-3=0,mid=0.5,out2=0",
        )
    kind, first, last = match.groups()
    if kind == "default":
        return list(model_blocks)
    if kind == "base":
        return [name for name in model_blocks if name in ("BASE", "CLIP", "T5", "IN", "OUT")]
    letters = _ALIASES.get(kind.upper(), kind.upper())
    blocks = [name for name in model_blocks if re.fullmatch(rf"{letters}\d+", name)]
    if first is None:
        return blocks
    return blocks[max(0, int(first) - 1) : int(last or first)]
