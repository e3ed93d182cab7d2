"""Adapters in few bits, and what that cost."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loralens.compression.loss import Loss, losses
from loralens.core.adapter import Adapter
from loralens.core.lowrank import LowRank
from loralens.core.quantised import quantised
from loralens.core.structured import Update
from loralens.core.threads import in_threads
from loralens.errors import MismatchError, OptionError, place


def quantise(
    adapter: Adapter, *, bits: int | Mapping[str, Sequence[int]] = 8, threads: int = 1
) -> tuple[Adapter, dict[str, Loss]]:
    """An adapter in whole numbers of a few bits, and what each of its modules lost.

    Saved as ``loralens-q``, the whole numbers are what is written; saved as anything else, their float32 products.

    Parameters
    ----------
    adapter : Adapter
    bits : int or mapping of str to sequence of int
        2 to 16 for every direction, or by module for each leading singular direction, largest first: directions not
        named are left out. `loralens.compression.bits.allocate` makes such mappings.
    threads : int
        Modules worked on at a time.

    Returns
    -------
    adapter : Adapter
        Modules of as many directions as have bits, in memory; everything else as it was.
    lost : dict of str to Loss
        By module, from both pairs of factors.

    Raises
    ------
    OptionError
        Bits that are none, of more directions than there are, or of other modules.
    MismatchError
        A module that is no pair.
    """
    if not isinstance(bits, int) and set(bits) != set(adapter):
        name = min(set(bits) ^ set(adapter))
        raise OptionError(f"{name} is in the adapter or in bits, not in both", fix="give bits for every module")

    def quantise_module(name: str) -> LowRank:
        module: Update = adapter[name]
        with place(name):
            if not isinstance(module, LowRank):
                raise MismatchError("is no pair of factors", fix="make it a pair first: loralens convert --rank R")
            return quantised(module, bits if isinstance(bits, int) else bits[name])

    after = replace(adapter, modules=in_threads(quantise_module, list(adapter), threads))
    return after, losses(adapter, after, threads=threads)
