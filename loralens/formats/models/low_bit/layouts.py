"""The table of low-bit layouts that safetensors checkpoints have, and all coded weights of a checkpoint."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from loralens.core.adapter import Finding
from loralens.core.lazy import LazyArray
from loralens.core.weights import CodedWeight
from loralens.formats.models.low_bit.bitsandbytes import find_4bit, find_int8
from loralens.formats.models.low_bit.e2m1 import find_packed, find_stacks
from loralens.formats.models.low_bit.grouped import CheckpointWeight, Config, Tensors
from loralens.formats.models.low_bit.packed_words import find_compressed, find_mlx, find_qweights
from loralens.linalg.exact import Singles

# The names of transformers' Conv1D layers. Heads and embeddings of the same models are not of this type.
CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")

# Each finds its own weights by the keys, dtypes and shapes of their parts. No two claim the same tensor.
FINDERS: tuple[Callable[[Tensors, Config | None], Iterator[CheckpointWeight]], ...] = (
    find_4bit,
    find_int8,
    find_qweights,
    find_mlx,
    find_compressed,
    find_packed,
    find_stacks,
)


class CodedTensors(NamedTuple):
    """The coded weights of a checkpoint by the key of the float weight, and all keys that they are stored under."""

    coded: Mapping[str, CodedWeight]
    parts: frozenset[str]

    def floats(self, stored: Tensors) -> dict[str, LazyArray]:
        """The stored tensors, with the weights as float32 in place of what they are stored in."""
        homes = {weight.stored: key for key, weight in self.coded.items()}
        # The order of the file is kept: a weight takes the place of its codes.
        return {
            homes.get(key, key): self.coded[homes[key]].floats() if key in homes else tensor
            for key, tensor in stored.items()
            if key in homes or key not in self.parts
        }

    def notes(self) -> tuple[Finding, ...]:
        """One note about what was decoded; none if nothing was."""
        counts = Counter(weight.layout for weight in self.coded.values())
        kinds = " and ".join(f"{count} weights are {layout}" for layout, count in counts.items())
        return (Finding("note", "low-bit", f"{kinds}, read as float32"),) if kinds else ()


def coded_tensors(stored: Tensors, config: Config | None, *, conv1d: bool = False) -> CodedTensors:
    """All coded weights among stored tensors. Only their descriptions are read, which are a few bytes each.

    ``conv1d`` says whether the model stores linear weights of floats as (in, out), as GPT-2 does. Quantisation turns
    them. A FormatError if the parts of a weight do not fit together, or it has a form that cannot be read.
    """
    weights = [each for find in FINDERS for each in find(stored, config)]
    parts = frozenset(key for each in weights for key in each.parts)
    coded = {each.key: _turn(each.weight) if conv1d and _is_conv1d(each.key) else each.weight for each in weights}
    return CodedTensors(coded, parts)


def _is_conv1d(key: str) -> bool:
    return key.removesuffix(".weight").rpartition(".")[2] in CONV1D_MODULES


def _turn(weight: CodedWeight) -> CodedWeight:
    """The transposed weight. It has no grid: an update of (in, out) would meet codes of (out, in)."""

    def decode(start: int, stop: int) -> Singles:
        return np.ascontiguousarray(weight.decode(0, weight.shape[0])[:, start:stop].T)

    return CodedWeight(weight.layout, weight.shape[::-1], weight.bits, decode, weight.stored, by_rows=False)
