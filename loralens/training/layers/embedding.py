"""The LoRA layer of an embedding: x is one-hot, so A x is a column of A."""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from loralens.training.layers.layer import LoRALayer, add_product


class EmbeddingLayer(LoRALayer):
    """The layer for ``nn.Embedding``: B is (dim, r), A is (r, vocab). B is drawn and A is 0, as in loralib and PEFT.

    The column of the padding token gets no gradient. An embedding that scales its output, as Gemma's does, scales the
    update too.
    """

    kind: ClassVar[str] = "embedding"

    @staticmethod
    def matrix(layer: nn.Module) -> Tensor:
        """The weight as (dim, vocab)."""
        return LoRALayer.matrix(layer).T

    def apply_dropout(self, x: Tensor) -> Tensor:
        """The input itself, since the numbers of tokens cannot be dropped."""
        return x

    def add_pair(self, y: Tensor, x: Tensor, B: Tensor, A: Tensor, scale: float) -> Tensor:
        """The sum y + scale · B A x, with y (…, dim)."""
        z = F.embedding(x, A.T, padding_idx=self.padding_idx)
        # transformers' own name: the factor √dim of Gemma's embedding, which is not part of its weight.
        outer = getattr(self.base_layer, "embed_scale", None)
        return add_product(y, z if outer is None else z * outer, B, scale)
