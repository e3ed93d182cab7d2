"""The LoRA layer of an embedding: x is one-hot, so A x is a column of A."""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from loralens.training.layer import LoRALayer, add_product


class EmbeddingLayer(LoRALayer):
    """Beside ``nn.Embedding``; B is (dim, r), A (r, vocab). Drawn is B, and A is 0, as loralib and PEFT have it.

    The column of the padding token gets no gradient; a layer that scales what it embeds (Gemma's) scales the update.
    """

    kind: ClassVar[str] = "embedding"

    @staticmethod
    def matrix(layer: nn.Module) -> Tensor:
        """The weight as (dim, vocab)."""
        return LoRALayer.matrix(layer).T

    def apply_dropout(self, x: Tensor) -> Tensor:
        """The input itself: numbers of tokens."""
        return x

    def add_pair(self, y: Tensor, x: Tensor, B: Tensor, A: Tensor, scale: float) -> Tensor:
        """The sum y + scale · B A x, y (…, dim)."""
        z = F.embedding(x, A.T, padding_idx=self.padding_idx)
        outer = getattr(self.base_layer, "embed_scale", None)
        return add_product(y, z if outer is None else z * outer, B, scale)
