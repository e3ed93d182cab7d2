"""Adapters of a switchboard whose numbers can be read anew, while plans that were made with them stay valid."""

from dataclasses import replace
from typing import final

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.structured import Update


@final
class ViewedAdapter:
    """An adapter that is a view of a model in memory: its numbers are read where they are, and nothing is kept.

    Attributes
    ----------
    source, adapter : Adapter
        The view.
    """

    __slots__ = ("adapter", "source")

    def __init__(self, source: Adapter) -> None:
        self.source = self.adapter = source

    def read_again(self) -> None:
        """Do nothing: every reading of a view gives the numbers of the moment."""


@final
class HeldAdapter:
    """A copy of the numbers of an adapter.

    Parameters
    ----------
    source : Adapter
        From where they are read: a file, which may be gone afterwards, or a model that is trained. Updates that are not
        pairs stay where they are.

    Attributes
    ----------
    adapter : Adapter
        The adapter with the numbers of the last reading.
    """

    __slots__ = ("_numbers", "_stored", "adapter", "source")

    def __init__(self, source: Adapter) -> None:
        self.source = source
        self._stored: list[LazyArray] = []
        self._numbers: list[Array] = []
        extra = {key: replace(item, tensor=self._hold(item.tensor)) for key, item in source.extra.items()}
        self.adapter = replace(source.map(self._hold_module), extra=extra)

    def read_again(self) -> None:
        """Read all numbers from the source as they are now. Names, shapes and scales are those of the beginning."""
        # Assigned at once, so that an interruption leaves the old numbers.
        self._numbers[:] = [stored.read() for stored in self._stored]

    def _hold_module(self, module: Update) -> Update:
        if not isinstance(module, LowRank):
            return module.load()
        B, A = (self._hold(factor) for factor in module.factors)
        return LowRank(B, A, module.scale, scaling=module.scaling, layout=module.layout, origin=module.origin)

    def _hold(self, stored: LazyArray) -> LazyArray:
        number = len(self._stored)
        self._stored.append(stored)
        self._numbers.append(stored.read())
        return LazyArray(lambda: self._numbers[number], shape=stored.shape, dtype=stored.dtype)
