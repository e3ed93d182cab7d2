"""Bent: DoRA adapters taken apart for a combination, into pairs to combine and stretches of the base weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from loralens.arithmetic.dora import Stretches, Weights, apart, named_keys
from loralens.arithmetic.method import Method
from loralens.core.adapter import Adapter
from loralens.core.carried import magnitudes
from loralens.core.together import Row, names_together
from loralens.core.weights import Weight
from loralens.errors import MismatchError, OptionError, place
from loralens.linalg.factor import Floats


@final
@dataclass(frozen=True, slots=True)
class Bent:
    """Adapters of which some are DoRA, taken apart.

    Attributes
    ----------
    adapters : tuple of Adapter
        As they are.
    plain : list of Adapter
        Of the pairs diag(g) L.
    parts : list of mapping of str to float64 array, shape (out,)
        g − 1 of every DoRA module of each adapter, by its own names.
    called : mapping of str to sequence of str or None
        Module of the combination → what each adapter calls it.
    weights : mapping of str to Weight
        By the names of any of them.
    """

    adapters: tuple[Adapter, ...]
    plain: list[Adapter]
    parts: list[dict[str, Floats]]
    called: Mapping[str, Sequence[str | None]]
    weights: Weights

    @classmethod
    def of(
        cls, adapters: Sequence[Adapter], labels: Sequence[str], row: Method, weights: Weights, threads: int
    ) -> "Bent | None":
        """None where none of them is DoRA."""
        if not any(map(magnitudes, adapters)):
            return None
        if not row.linear:
            raise OptionError(
                f"{row.name} does not combine DoRA: what it adds to the base is of full rank, and no sum of pairs",
                fix="give --method sum or average; or make each a plain pair with loralens merge and extract",
            )
        separated = []
        for adapter, label in zip(adapters, labels, strict=True):
            with place(label):
                separated.append(apart(adapter, weights, threads=threads))
        called = names_together(adapters, labels)
        return cls(tuple(adapters), [one for one, _ in separated], [part for _, part in separated], called, weights)

    def each(self, name: str, out: int) -> Floats:
        """h_t of one module, shape (T, out): 0 of an adapter that is not DoRA there."""
        own = zip(self.called[name], self.parts, strict=True)
        return np.array([part[one] if one is not None and one in part else np.zeros(out) for one, part in own])

    def weight(self, name: str) -> Weight:
        """The base weight of one module."""
        for own_name in self.called[name]:
            if own_name is not None and own_name in self.weights:
                return self.weights[own_name]
        raise MismatchError(f"the base weight of {name} is not there", fix="give the base that it was trained on")

    def stretches(self, rows: Mapping[str, Row], h: Mapping[str, Floats]) -> Stretches:
        """The stretches ``h`` of the result, with what a DoRA adapter needs besides."""
        modules = {name: (next(one for one in row if one is not None), self.called[name]) for name, row in rows.items()}
        stretches = Stretches(h, {name: self.weight(name) for name in rows}, {})
        return replace(stretches, keys=named_keys(self.adapters, modules)) if stretches.any else stretches

    def notes(self, stretches: Stretches) -> tuple[str, ...]:
        """What to say of the result."""
        count = sum(map(bool, self.parts))
        came = "DoRA too, exact for this base" if stretches.any else "a plain sum of pairs: all stretches cancel"
        return (f"{count} of {len(self.parts)} adapters {'is' if count == 1 else 'are'} DoRA; the result is {came}",)
