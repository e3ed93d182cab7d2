"""Counts the tokens that are lost because texts are longer than the length at which they are cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loralens.core.messages import note
from loralens.errors import MismatchError, OptionError
from loralens.tables.numbers import count
from loralens.tables.table import Keys, Recorded
from loralens.verbs.models.loaded import Loaded
from loralens.verbs.models.texts import Dialogue

if TYPE_CHECKING:
    from loralens.training.texts.tasks import Examples, Task


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
    from loralens.training.texts.encoding import encode_text  # torch takes a second

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


# Logits of a text in a row and alone differ by a few roundings of the dtype, relative to the largest logit, but in 16
# bits by no more than APART. Different kernels for rows of other lengths may cause LEAST. If texts see each other, the
# logits of a trained model differ by about their size, and those of a new model by as little as 4e-4 (LFM2).
ROUNDINGS = 4
LEAST, APART = 1e-4, 1e-2
TOKENS = 16  # of a text in the check


def pack_rows(loaded: Loaded, task: "Task", examples: "Examples", *, length: int) -> "Examples":
    """The texts in rows of at most ``length`` tokens.

    Raises
    ------
    OptionError
        The task does not predict the next token.
    MismatchError
        The texts of a row see each other in this model.
    """
    from loralens.training.texts.packing import filled_share, pack_texts

    if task.labelled or task.task_type != "CAUSAL_LM":
        raise OptionError(f"--pack is for causal-lm, and the task is {task.name}", fix="leave out --pack")
    _check_apart(loaded, examples)
    most = loaded.length(length)
    rows = pack_texts(examples, most)
    share = f"{100 * filled_share(rows, most):.0f} % of {most} tokens each"
    note(f"packed {count(len(examples), 'text')} into {count(len(rows), 'row')}, {share}")
    return rows


def _check_apart(loaded: Loaded, examples: "Examples") -> None:
    """Refuse a model for which a text in a row is not the text alone."""
    import torch

    from loralens.training.layers.quantised import codes_of

    texts = [tokens[:TOKENS] for tokens in examples.tokens if len(tokens) > 1][:2]
    if len(texts) < 2:
        return
    device = next(loaded.model.parameters()).device
    row = torch.tensor([texts[0] + texts[1]] * 2, device=device)  # two rows, as some kernels take only one
    positions = torch.tensor([[*range(len(texts[0])), *range(len(texts[1]))]] * 2, device=device)
    alone = torch.tensor([texts[1]], device=device)
    with torch.no_grad():
        logits = loaded.model(input_ids=row, position_ids=positions, use_cache=False).logits[1, len(texts[0]) :]
        logits_alone = loaded.model(input_ids=alone, use_cache=False).logits[0]
    # The rounding of int8 depends on the other rows of a product.
    rounding = APART if codes_of(loaded.model) else ROUNDINGS * torch.finfo(logits.dtype).eps
    tolerance = max(LEAST, min(APART, rounding)) * float(logits_alone.abs().max())
    if float((logits - logits_alone).abs().max()) > tolerance:
        config: Any = loaded.model.config
        raise MismatchError(
            f"the texts of a packed row see each other in this {config.model_type} model",
            fix="leave out --pack; --group-by-length saves padding too",
        )


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
            fix="train it with --task masked-lm, or give a causal model (some need is_decoder in config.json)",
        )
