"""The table of low-bit layouts that safetensors checkpoints have, and all coded weights of a checkpoint."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from loralens.core.adapter import Finding
from loralens.core.lazy import LazyArray
from loralens.formats.models.low_bit import (
    awq,
    bitsandbytes_4bit,
    bitsandbytes_int8,
    compressed_tensors,
    e2m1,
    gptq,
    mlx,
)
from loralens.formats.models.low_bit.coded_weight import CodedWeight
from loralens.formats.models.low_bit.parts import Config, Found, Tensors

# Each finds its own weights by the keys, dtypes and shapes of their parts. No two claim the same tensor.
FINDERS: tuple[Callable[[Tensors, Config | None], Iterator[Found]], ...] = (
    bitsandbytes_4bit.find,
    bitsandbytes_int8.find,
    gptq.find,
    awq.find,
    mlx.find,
    compressed_tensors.find,
    e2m1.find_packed,
    e2m1.find_modelopt,
    e2m1.find_stacks,
)


class CodedTensors(NamedTuple):
    """The coded weights of a checkpoint.

    Attributes
    ----------
    coded
        Key of the float weight → the weight.
    parts
        The keys of all tensors that they are stored in.
    """

    coded: Mapping[str, CodedWeight]
    parts: frozenset[str]

    def floats(self, stored: Tensors) -> dict[str, LazyArray]:
        """The stored tensors, with the weights as float32 in place of what they are stored in."""
        homes = {weight.stored: key for key, weight in self.coded.items()}
        # In the order of the file, as a weight stands where its codes are.
        return {
            homes.get(key, key): self.coded[homes[key]].floats() if key in homes else tensor
            for key, tensor in stored.items()
            if key in homes or key not in self.parts
        }

    def notes(self) -> tuple[Finding, ...]:
        """One note of what was decoded; none if nothing was."""
        counts = Counter(weight.layout for weight in self.coded.values())
        if not counts:
            return ()
        kinds = [f"{count} weights are {layout}" for layout, count in counts.items()]
        return (Finding("note", "low-bit", f"{' and '.join(kinds)}, read as float32"),)


def coded_tensors(stored: Tensors, config: Config | None) -> CodedTensors:
    """All coded weights among stored tensors. Only their descriptions are read, which are a few bytes each.

    Raises
    ------
    FormatError
        The parts of a weight do not fit together, or it has a form that cannot be read.
    """
    found = [each for find in FINDERS for each in find(stored, config)]
    parts = frozenset(key for each in found for key in each.parts)
    return CodedTensors({each.key: each.weight for each in found}, parts)
