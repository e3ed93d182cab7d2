"""The quantisation of an adapter to a few bits."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loralens.core.adapter import Adapter
from loralens.core.few_bits.quantised import quantise_module
from loralens.core.lowrank import LowRank
from loralens.core.structured import Update
from loralens.core.threads import in_threads
from loralens.errors import MismatchError, OptionError, place


def quantise(adapter: Adapter, *, bits: int | Mapping[str, Sequence[int]], threads: int = 1) -> Adapter:
    """Quantise an adapter to integers of a few bits; `loralens.compression.loss.losses` measures what that costs.

    The format ``loralens-q`` stores the integers. Other formats store the factors that the integers stand for, float32.

    Parameters
    ----------
    adapter : Adapter
    bits : int or mapping of str to sequence of int
        2 to 16 bits for every direction; or, by module, the bits of each leading singular direction, largest first, as
        `loralens.compression.bits.allocate_bits` chooses them. Further directions are left out.
    threads : int
        Modules worked on at a time.

    Returns
    -------
    Adapter
        Every module has only the directions that got bits. Its factors are in memory; all else is unchanged.

    Raises
    ------
    OptionError
        Bits are out of range, are given for more directions than there are, or for other modules.
    MismatchError
        A module is not a pair.
    FormatError
        A module holds NaN or Inf, or is too large for float32.
    """
    # Bits for some modules alone would leave open what becomes of the others.
    if not isinstance(bits, int) and set(bits) != set(adapter):
        name = min(set(bits) ^ set(adapter))
        raise OptionError(
            f"only one of the adapter and bits has {name}", fix="give bits for every module of the adapter"
        )

    def quantise_named(name: str) -> LowRank:
        module: Update = adapter[name]
        with place(name):
            if not isinstance(module, LowRank):
                # Only a product has directions to which bits could be given.
                raise MismatchError("is not a pair of factors", fix="make it a pair first: loralens convert --rank R")
            return quantise_module(module, bits if isinstance(bits, int) else bits[name])

    return replace(adapter, modules=in_threads(quantise_named, list(adapter), threads))
