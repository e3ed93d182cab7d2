"""The LoRA layer of an embedding: x is one-hot, so A x is a column of A."""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from loralens.training.layer import LoRALayer, accumulated


class EmbeddingLayer(LoRALayer):
    """Beside ``nn.Embedding``; B is (dim, r), A (r, vocab). Drawn is B, and A is 0, as loralib and PEFT have it.

    The column of the padding token gets no gradient; a layer that scales what it embeds (Gemma's) scales the update.
    """

    kind: ClassVar[str] = "embedding"

    @staticmethod
    def matrix(layer: nn.Module) -> Tensor:
        """The weight as (dim, vocab)."""
        return LoRALayer.matrix(layer).T

    def dropped(self, x: Tensor) -> Tensor:
        """The input itself: numbers of tokens."""
        return x

    def plus(self, y: Tensor, x: Tensor, B: Tensor, A: Tensor, scale: float) -> Tensor:
        """The sum y + scale · B A x, y (…, dim)."""
        z = F.embedding(x, A.T, padding_idx=self.padding_idx)
        outer = getattr(self.base_layer, "embed_scale", None)
        return accumulated(y, z if outer is None else z * outer, B, scale)
