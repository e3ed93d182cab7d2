"""The table of low-bit layouts that safetensors checkpoints have, and all coded weights of a checkpoint."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from loralens.core.lazy import LazyArray, Recent
from loralens.core.weights import CodedWeight
from loralens.errors import place
from loralens.formats.models.low_bit import packed_words
from loralens.formats.models.low_bit.bitsandbytes import STATE, TABLES, four_bit, int8
from loralens.formats.models.low_bit.grouped import Config, GroupedWeight, Source, Tensors
from loralens.formats.models.model_files import BESIDE
from loralens.linalg.exact import Singles

# The names of transformers' Conv1D layers. Heads and embeddings of the same models are not of this type.
CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")

# Each finds its own weights by the keys, dtypes and shapes of their parts. No two claim the same tensor.
# Packed matrices that stay in memory while the rows of their weights are read: one for each of the usual two threads.
HELD = 2

Reader = Callable[[Source, str], GroupedWeight | None]
# The end of a key that shows a layout → the end of the key of its weight, and what reads the weight. The reader gets
# the key without its end, and returns None for tensors that are not of its layout. No two claim the same tensor.
READERS: Mapping[str, tuple[str, Reader]] = {
    **{f"{STATE}{kind}": ("", partial(four_bit, kind=kind)) for kind in TABLES},
    ".SCB": (".weight", int8),
    ".qweight": (".weight", packed_words.qweight),
    ".scales": (".weight", packed_words.mlx),
    ".weight_packed": (".weight", packed_words.compressed),
    ".weight_scale_2": (".weight", packed_words.modelopt),
    "_blocks": ("", packed_words.gpt_oss),
}


def decode_low_bit(
    stored: Tensors, config: Config | None, *, conv1d: bool
) -> tuple[dict[str, LazyArray], dict[str, CodedWeight]]:
    """The tensors of a checkpoint with low-bit weights as float32 in place of their parts, and these weights.

    Only their descriptions are read, which are a few bytes each. ``conv1d`` says whether the model stores linear
    weights of floats as (in, out), as GPT-2 does. Quantisation turns them. A FormatError if the parts of a weight do
    not fit together, or it has a form that cannot be read.
    """
    source = Source(stored, config or {}, Recent(HELD))
    coded: dict[str, CodedWeight] = {}
    parts: set[str] = set()
    for end, (weight_end, read) in READERS.items():
        for name in [key.removesuffix(end) for key in stored if key.endswith(end)]:
            key = name + weight_end
            with place(key):
                grouped = read(source, name)
            if grouped:
                # Scales of activations and of the cache, which the weight does not depend on, belong to it as well.
                beside = (f"{name}.{part}" for part in (*BESIDE, "input_global_scale"))
                parts |= {*grouped.keys, *source.there(*beside)}
                turned = conv1d and key.removesuffix(".weight").rpartition(".")[2] in CONV1D_MODULES
                coded[key] = _turn(grouped.coded(stored)) if turned else grouped.coded(stored)
    # The order of the file is kept: a weight takes the place of its codes.
    homes = {weight.stored: key for key, weight in coded.items()}
    floats = {
        homes.get(key, key): coded[homes[key]].floats() if key in homes else tensor
        for key, tensor in stored.items()
        if key in homes or key not in parts
    }
    return floats, coded


def _turn(weight: CodedWeight) -> CodedWeight:
    """The transposed weight. It has no grid: an update of (in, out) would meet codes of (out, in)."""

    def decode(start: int, stop: int) -> Singles:
        return np.ascontiguousarray(weight.decode(0, weight.shape[0])[:, start:stop].T)

    return CodedWeight(weight.layout, weight.shape[::-1], weight.bits, decode, weight.stored, by_rows=False)
