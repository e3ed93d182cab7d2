"""Tied: a head that shares its weight with the embedding, and what that means for a merge."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, final

import numpy as np

from loralens.core.lazy import LazyArray
from loralens.merge.matrix import MatrixRows
from loralens.merge.plan import TensorPlan, as_matrix

HEAD = "lm_head.weight"
HEADED = ("CausalLM", "LMHeadModel", "ConditionalGeneration")  # ends of the names of models that have one
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")


@final
@dataclass(frozen=True, slots=True)
class Tied:
    """The key of a head that the base does not hold, and of the embedding that stands for it; both None where untied.

    Attributes
    ----------
    head, embedding : str or None
    tensor : LazyArray or None
        The shared weight.
    """

    head: str | None = None
    embedding: str | None = None
    tensor: LazyArray | None = None

    @classmethod
    def of(cls, base: Mapping[str, LazyArray], config: Mapping[str, Any]) -> Self:
        """As ``config.json`` says it.

        Some models are tied unless it says otherwise, so a missing head counts as tied too, but in a model that by its
        architecture has none.
        """
        made = config.get("architectures")
        if isinstance(made, list) and made and not any(str(name).endswith(HEADED) for name in made):
            return cls()
        text = config.get("text_config")
        said = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)
        if any(key.endswith(HEAD) for key in base) or said is False:
            return cls()
        for end in EMBEDDINGS:
            found = [key for key in base if key == end or key.endswith(f".{end}")]
            if len(found) == 1:
                return cls(HEAD, found[0], base[found[0]])
        return cls()

    def shown(self, base: Mapping[str, LazyArray]) -> Mapping[str, LazyArray]:
        """The base with a head of its own, equal to the embedding."""
        return {**base, self.head: self.tensor} if self.head and self.tensor is not None else base

    def spared(self, changed: Mapping[str, TensorPlan]) -> dict[str, TensorPlan]:
        """The plans without one for the head that would only make it what the embedding becomes."""
        head, embedding = (changed.get(key) if key else None for key in (self.head, self.embedding))
        if head is None or embedding is None or head.slabs or embedding.slabs or head.tokens or embedding.tokens:
            return dict(changed)
        same = head.shape == embedding.shape and _equal(head, embedding)
        return {key: tensor for key, tensor in changed.items() if key != self.head or not same}

    def consequences(self, changed: Mapping[str, TensorPlan], *, untie: bool) -> tuple[list[str], dict[str, object]]:
        """What to tell the user, and which fields of the configuration change."""
        if self.head and untie:
            note = f"{self.head} is written as a weight of its own, and tie_word_embeddings set to false"
            return [note], {"tie_word_embeddings": False}
        if self.head and self.embedding in changed:
            note = f"{self.head} shares the weight of {self.embedding} and changes with it (--untie keeps it apart)"
            return [note], {}
        return [], {}

    def completed(self, changed: Mapping[str, TensorPlan]) -> dict[str, TensorPlan]:
        """The plans with one for the head, which the base's files do not hold."""
        if not self.head or self.tensor is None:
            return dict(changed)
        here = changed.get(self.head)
        if here is None:
            return {**changed, self.head: TensorPlan(self.head, None, as_matrix(self.tensor.shape), (), self.tensor)}
        return {**changed, self.head: replace(here, base=None, replacement=here.replacement or self.tensor)}


def _equal(head: TensorPlan, embedding: TensorPlan) -> bool:
    """Whether two tensors of one shape hold the same numbers, some rows at a time."""
    both = (MatrixRows(one.source, one.matrix).blocks() for one in (head, embedding))
    return all(np.array_equal(ours, theirs) for ours, theirs in zip(*both, strict=True))
