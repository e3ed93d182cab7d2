"""A measurement of whether a model sees later tokens, which a causal language model must not."""

from typing import TYPE_CHECKING, Any

from loralens.errors import MismatchError
from loralens.verbs.inputs.loaded import Loaded

if TYPE_CHECKING:
    from loralens.training.tasks import Examples

CAUSAL = "AutoModelForCausalLM"  # the head of tasks that need it
TOKENS = 8  # of the text that is looked at
ROUNDINGS = 4  # of the dtype, relative to the largest logit, by which what does not depend on a token may differ …
LEAST = 1e-4  # … but at least by this: other kernels for other rows


def check_causal(loaded: Loaded, examples: "Examples") -> None:
    """Refuse a model whose logits at a position change with a later token: two rows that differ in their last alone.

    Examples without a text of two tokens, or without two different tokens, tell nothing and pass.

    Raises
    ------
    MismatchError
        It is no causal model: what changed is said.
    """
    import torch

    text = next((tokens[:TOKENS] for tokens in examples.tokens if len(tokens) > 1), None)
    other = next((token for tokens in examples.tokens for token in tokens if text and token != text[-1]), None)
    if text is None or other is None:
        return
    device = next(loaded.model.parameters()).device
    ids = torch.tensor([text, [*text[:-1], other]], device=device)
    with torch.no_grad():
        logits = loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    # The change is compared with the size of the logits, since their scale differs between models.
    size, moved = float(logits.abs().max()), float((logits[0] - logits[1]).abs().max())
    if moved > size * max(LEAST, ROUNDINGS * torch.finfo(logits.dtype).eps):
        config: Any = loaded.model.config
        raise MismatchError(
            f"this {config.model_type} model looks at later tokens, so it would copy what it is to foretell: another "
            f"last token changes logits before it by up to {moved:.2g} (they are up to {size:.2g})",
            fix="train it with --task masked-lm; or give a causal model (config.json of some says is_decoder)",
        )
