"""Counts the tokens that are lost because texts are longer than the length at which they are cut."""

from collections.abc import Sequence
from dataclasses import dataclass

from loralens.core.messages import note
from loralens.verbs.inputs.corpus.dialogues import Dialogue
from loralens.verbs.inputs.loaded import Loaded

# In parts, so that the tokens of a large corpus are never all in memory.
CHUNK = 1024  # texts that are tokenised at a time
DEFAULT_LENGTH = 256  # of every command that cuts texts; whoever leaves the option out has not asked for so many tokens


@dataclass(frozen=True, slots=True)
class Cut:
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

    def record(self) -> dict[str, int]:
        """The numbers as a JSON object."""
        return {"length": self.length, "texts": self.texts, "tokens": self.tokens}

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
