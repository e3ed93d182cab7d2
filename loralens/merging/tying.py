"""Tied: weights that share the numbers of the embedding, and what that means for a merge.

Unmerged, an adapter on the embedding leaves the head as it is, and one on the head leaves the embedding. A model that
stores both as one tensor can do neither: the copies have to be written as weights of their own.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self, final

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank
from loralens.errors import MismatchError
from loralens.merging.extras import Changes
from loralens.merging.matrix import MatrixRows
from loralens.merging.plan import Slab, TensorPlan, as_matrix
from loralens.merging.recast import recast_dtype
from loralens.merging.ties import TIE, Ties, find_ties
from loralens.merging.update import Weighted

Plans = Mapping[str, TensorPlan]


@final
@dataclass(frozen=True, slots=True)
class Settled:
    """The plans of a merge once it is known what stays tied.

    Attributes
    ----------
    plans : dict of str to TensorPlan
    notes : tuple of str
        What to tell the user.
    config : mapping
        Fields of ``config.json`` that change.
    """

    plans: dict[str, TensorPlan]
    notes: tuple[str, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class Tied:
    """Weights of a base that share the numbers of its embedding; nothing where none do.

    Attributes
    ----------
    ties : Ties
        Their names.
    stored : mapping of str to LazyArray
        What the base stores of them: the embedding, its copies, biases that are untied along with them.
    """

    ties: Ties
    stored: Mapping[str, LazyArray]
    _equal: dict[str, bool] = field(default_factory=dict, compare=False)  # what `copies` has looked at

    @classmethod
    def of(cls, base: Mapping[str, LazyArray], config: Mapping[str, Any]) -> Self:
        """As the names in the base and ``config.json`` say it."""
        ties = find_ties(base, config)
        names = {ties.embedding, *ties.copies, *ties.biases.values()}
        return cls(ties, {key: tensor for key, tensor in base.items() if key in names})

    @property
    def missing(self) -> tuple[str, ...]:
        """The keys of the copies that the base does not store, the head first."""
        return tuple(key for key in self.ties.copies if key not in self.stored)

    @property
    def lacks_head(self) -> bool:
        """Whether there is a head whose weight the base does not store."""
        return self.ties.head in self.missing

    def shown(self, base: Mapping[str, LazyArray]) -> Mapping[str, LazyArray]:
        """The base with weights of their own, equal to the embedding, for the copies that it does not store."""
        return self.ties.shown(base)

    def meant(
        self, adapter: Adapter, key: str, touched: Collection[str], changes: Changes | None = None
    ) -> tuple[str, ...]:
        """The weights that an adapter changes when it speaks of ``key``: that one, or all that share its numbers.

        PEFT trains the copies along with the embedding under ``ensure_weight_tying``, always where single tokens are
        trained, and where the vocabulary was resized. What the adapter itself says of a copy (``touched``) stands.
        """
        if key != self.ties.embedding:
            return (key,)
        new = changes.replacement if changes else None
        resized = new is not None and new.shape != self.stored[key].shape
        tokens = changes is not None and changes.tokens is not None
        if not ((adapter.config or {}).get("ensure_weight_tying") or resized or tokens):
            return (key,)
        return (key, *(copy for copy in self.copies() if copy not in touched))

    def copies(self) -> list[str]:
        """The keys that have the embedding's numbers, the head first; a copy that the base stores is read once."""
        return [key for key in self.ties.copies if key in self.missing or self._is_copy(key)]

    def settled(self, changed: Plans, *, untie: bool | None = None, dtype: str | None = None) -> Settled:
        """The plans with one for every weight that has to be written, and what follows from untying.

        Parameters
        ----------
        changed : mapping of str to TensorPlan
            Made for a base as `shown`.
        untie : bool or None
            Whether the copies become weights of their own, or stay what the embedding is; None: whatever the unmerged
            adapter does.
        dtype : str or None
            In which the model is written.

        Raises
        ------
        MismatchError
            A copy is adapted by itself and is to stay tied.
        """
        embedding = self.ties.embedding
        if embedding is None or not (untie or any(key in changed for key in (embedding, *self.ties.copies))):
            return Settled(dict(changed))
        copies = self.copies()
        apart = [key for key in copies if not alike(changed.get(key), changed.get(embedding))]
        if untie or (untie is None and apart):
            return self._untied(changed, copies, apart, dtype)
        if any(key in changed for key in apart):
            raise MismatchError(
                f"{apart[0]} is adapted apart from {embedding}, and the base has one weight for both",
                fix="give it a weight of its own: leave out --keep-tied",
            )
        plans = {key: plan for key, plan in changed.items() if key not in copies}
        plans |= {
            key: replace(changed[embedding], key=key, base=self.stored[key]) for key in copies if key in self.stored
        }
        aside = ", unlike in the unmerged adapter" if apart else ""
        notes = [f"{key} shares the weight of {embedding} and changes with it{aside}" for key in copies[:1]]
        return Settled(plans, tuple(notes))

    def _is_copy(self, key: str) -> bool:
        """Whether a weight that the base stores beside the embedding has its numbers: else it is not tied."""
        if key not in self._equal:
            one, other = self.stored[key], self.stored[self.ties.embedding or key]
            self._equal[key] = one.shape == other.shape and one.dtype == other.dtype and _same(one, other)
        return self._equal[key]

    def _untied(self, changed: Plans, copies: list[str], apart: list[str], dtype: str | None) -> Settled:
        """Every copy that the base does not store becomes a tensor of the model."""
        embedding, by_config = self.ties.embedding, bool(self.ties.untied)
        assert embedding is not None
        tensor = self.stored[embedding]
        written = [key for key in copies if key in self.missing and (by_config or key in apart)]
        new = dict.fromkeys(written, tensor)
        new |= {key: self.stored[source] for key, source in self.ties.biases.items() if by_config}
        plans = {key: plan for key, plan in changed.items() if key not in self.missing}
        for key, source in new.items():
            plan = changed.get(key, TensorPlan(key, None, as_matrix(source.shape)))
            plans[key] = replace(plan, base=None, replacement=plan.replacement or source)
        size = sum(plans[key].source.size * recast_dtype(plans[key], dtype).itemsize for key in new)
        notes = [f"{', '.join(new)}: written as a weight of its own, {size:,} bytes more"] if new else []
        notes += [
            f"{key} keeps its numbers: the adapter changes {embedding} alone" for key in apart if key not in changed
        ]
        notes.append(
            f"{TIE} is set to false"
            if by_config
            else "config.json stays as it is: transformers from 5 on does not tie weights that differ in the file"
        )
        return Settled(plans, tuple(notes), self.ties.untied)


def alike(one: TensorPlan | None, other: TensorPlan | None) -> bool:
    """Whether two tensors that hold the same numbers are changed to the same numbers."""
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.tokens is not other.tokens or len(one.slabs) != len(other.slabs):
        return False
    ours, theirs = one.replacement, other.replacement
    if ours is not theirs and (ours is None or theirs is None or not _same(ours, theirs)):
        return False
    return all(map(_slabs_alike, one.slabs, other.slabs))


def _slabs_alike(one: Slab, other: Slab) -> bool:
    """Whether two slabs add the same: the same factors, or transposed ones to a weight that lies the other way."""
    if (one.start, one.stop) != (other.start, other.stop) or len(one.terms) != len(other.terms):
        return False
    ours, theirs = one.magnitude, other.magnitude
    if (ours is None) != (theirs is None) or (ours and theirs and ours.lengths is not theirs.lengths):
        return False
    return all(
        _terms_alike(*pair, turned=one.transposed != other.transposed)
        for pair in zip(one.terms, other.terms, strict=True)
    )


def _terms_alike(one: Weighted, other: Weighted, *, turned: bool) -> bool:
    (strength, first), (weight, second) = one, other
    if strength != weight or first is second:
        return strength == weight and not turned
    if not (isinstance(first, LowRank) and isinstance(second, LowRank) and first.scale == second.scale):
        return False
    B, A = (second.A.T, second.B.T) if turned else (second.B, second.A)
    return np.array_equal(first.B, B) and np.array_equal(first.A, A)


def _same(one: LazyArray, other: LazyArray) -> bool:
    """Whether two tensors of one shape hold the same numbers, some rows at a time."""
    both = (MatrixRows(tensor, as_matrix(tensor.shape)).blocks() for tensor in (one, other))
    return one.shape == other.shape and all(np.array_equal(ours, theirs) for ours, theirs in zip(*both, strict=True))
