"""The losses to differentiate during calibration: sums over positions, so that all positions weigh the same."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def next_token(output: Any, batch: Any) -> "Tensor":
    """Σ −ln p(next token) of a causal language model, over neighbours that are both in the attention mask."""
    from torch.nn.functional import cross_entropy

    logits, ids, mask = output.logits[:, :-1], batch["input_ids"][:, 1:], batch["attention_mask"].bool()
    both = (mask[:, 1:] & mask[:, :-1]).to(logits.device)
    return cross_entropy(logits[both].float(), ids.to(logits.device)[both], reduction="sum")


def label(output: Any, batch: Any) -> "Tensor":
    """Σ −ln p(label) of a classifier; the batch has ``labels``."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(output.logits.float(), batch["labels"].to(output.logits.device), reduction="sum")
