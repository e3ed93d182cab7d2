"""Counts the tokens that are lost because texts are longer than the length at which they are cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loralens.core.messages import note
from loralens.errors import MismatchError
from loralens.tables.table import Keys, Recorded
from loralens.verbs.models.loaded import Loaded
from loralens.verbs.models.texts import Dialogue

if TYPE_CHECKING:
    from loralens.training.tasks import Examples


# In parts, so that the tokens of a large corpus are never all in memory.
CHUNK = 1024  # texts that are tokenised at a time
DEFAULT_LENGTH = 256  # of every command that cuts texts; whoever leaves the option out has not asked for so many tokens


@dataclass(frozen=True, slots=True)
class Cut(Recorded):
    """The numbers of texts and tokens that are lost when texts are cut to a length.

    Attributes
    ----------
    length : int
        The most tokens of a text that are kept, with those that the tokenizer adds.
    texts, tokens : int
        The number of longer texts, and of their tokens that are left out.
    of : int
        The number of all texts.
    limited : bool
        Whether the model has no positions for more tokens, so that a larger length would change nothing.
    asked_length : int
        The length that was asked for, which may be more than the model has positions for.
    """

    length: int
    texts: int
    tokens: int
    of: int
    limited: bool
    asked_length: int = DEFAULT_LENGTH

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "length",
            "texts",
            "tokens",
        )

    def warn(self, data: str, *, length: bool = True) -> None:
        """Tell the user what is left out, if anything is, and of a length for which the model has no positions.

        ``data`` is the name of the texts in the message. Without ``length`` nothing is said of the length, for texts
        that are not the first ones of a command.
        """
        if length and self.asked_length > self.length and self.asked_length != DEFAULT_LENGTH:
            positions = f"the model has positions for {self.length:,} tokens"
            note(f"--length {self.asked_length:,} is too large: {positions}, and texts are cut to that")
        if not self.texts:
            return
        longer = f"{self.texts:,} of {self.of:,} texts {'is' if self.texts == 1 else 'are'} longer"
        lost = "1 token is" if self.tokens == 1 else f"{self.tokens:,} tokens are"
        way_out = "the model has no positions for more" if self.limited else "a larger --length keeps more"
        note(f"{data}: {longer} than {self.length} tokens; {lost} left out ({way_out})")


def count_cut(loaded: Loaded, texts: Sequence[str | Dialogue], *, length: int) -> Cut:
    """Count what is left out of texts if ``length`` tokens of each are used, or fewer if the model has no positions."""
    from loralens.verbs.models.encoding import encode_text  # torch takes a second

    longest = loaded.length(length)
    beyond: list[int] = []
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        if all(isinstance(text, str) for text in chunk):
            # verbose=False: the tokenizer would warn of every long text, and the count says it once for all.
            tokens = loaded.tokenizer(list(chunk), verbose=False)["input_ids"]
        else:
            tokens = [encode_text(loaded.tokenizer, text)[0] for text in chunk]
        beyond += [len(row) - longest for row in tokens if len(row) > longest]
    return Cut(longest, len(beyond), sum(beyond), len(texts), limited=longest == loaded.longest, asked_length=length)


CAUSAL = "AutoModelForCausalLM"  # the head of the tasks for which the test is made
CAUSALITY_TOKENS = 8  # of the text; a model that sees later tokens sees the next one, so that a short text is enough
# A change of the logits within a tolerance is rounding, and not an effect of the last token. The tolerance is relative
# to the largest logit: a few roundings of the dtype, but at least what different kernels for two rows may cause.
CAUSALITY_ROUNDINGS = 4
CAUSALITY_LEAST = 1e-4


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

    text = next((tokens[:CAUSALITY_TOKENS] for tokens in examples.tokens if len(tokens) > 1), None)
    other = next((token for tokens in examples.tokens for token in tokens if text and token != text[-1]), None)
    if text is None or other is None:
        return
    device = next(loaded.model.parameters()).device
    ids = torch.tensor([text, [*text[:-1], other]], device=device)
    with torch.no_grad():
        logits = loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    # The change is compared with the largest logit, since the scale of logits differs between models.
    size, moved = float(logits.abs().max()), float((logits[0] - logits[1]).abs().max())
    if moved > size * max(CAUSALITY_LEAST, CAUSALITY_ROUNDINGS * torch.finfo(logits.dtype).eps):
        config: Any = loaded.model.config
        raise MismatchError(
            f"this {config.model_type} model looks at later tokens, so it could copy the token that it has to predict: "
            f"another last token changes the logits before it by up to {moved:.2g} (the largest is {size:.2g})",
            fix="give a causal model (some need is_decoder in config.json)",
        )
