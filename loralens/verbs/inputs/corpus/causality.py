"""A test of whether a model sees later tokens, which a causal language model must not."""

from typing import TYPE_CHECKING, Any

from loralens.errors import MismatchError
from loralens.verbs.inputs.loaded import Loaded

if TYPE_CHECKING:
    from loralens.training.texts.tasks import Examples

CAUSAL = "AutoModelForCausalLM"  # the head of the tasks for which the test is made
TOKENS = 8  # of the text; a model that sees later tokens sees the next one, so that a short text is enough
# A change of the logits within a tolerance is rounding, and not an effect of the last token. The tolerance is relative
# to the largest logit: a few roundings of the dtype, but at least what different kernels for two rows may cause.
ROUNDINGS = 4
LEAST = 1e-4


def check_causal(loaded: Loaded, examples: "Examples") -> None:
    """Refuse a model whose logits at a position depend on a later token.

    The model is called with two rows that differ only in their last token. Examples that have no text of two tokens, or
    no two different tokens, cannot show a difference and are accepted.

    Raises
    ------
    MismatchError
        The model is not causal. The message has the change of the logits.
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
    # The change is compared with the largest logit, since the scale of logits differs between models.
    size, moved = float(logits.abs().max()), float((logits[0] - logits[1]).abs().max())
    if moved > size * max(LEAST, ROUNDINGS * torch.finfo(logits.dtype).eps):
        config: Any = loaded.model.config
        raise MismatchError(
            f"this {config.model_type} model looks at later tokens, so it could copy the token that it has to predict: "
            f"another last token changes the logits before it by up to {moved:.2g} (the largest is {size:.2g})",
            fix="train it with --task masked-lm, or give a causal model (some need is_decoder in config.json)",
        )
