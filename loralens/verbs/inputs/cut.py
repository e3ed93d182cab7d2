"""Counts how many tokens are lost because texts are longer than the length at which they are cut."""

from collections.abc import Sequence
from dataclasses import dataclass

from loralens.core.messages import note
from loralens.verbs.inputs.loaded import Loaded

# In parts, so that the tokens of a large corpus are never all in memory.
CHUNK = 1024  # texts that are tokenised at a time


@dataclass(frozen=True, slots=True)
class Cut:
    """What cutting texts to a number of tokens leaves out.

    Attributes
    ----------
    length : int
        Tokens that are kept of a text, those that the tokenizer adds included.
    texts, tokens : int
        Texts that are longer, and tokens of theirs that are left out.
    of : int
        Texts in all.
    limited : bool
        The model has no positions for more, however many tokens were asked for.
    """

    length: int
    texts: int
    tokens: int
    of: int
    limited: bool

    def record(self) -> dict[str, int]:
        """As a JSON object."""
        return {"length": self.length, "texts": self.texts, "tokens": self.tokens}

    def warn(self, data: str) -> None:
        """Say what is left out, if anything is; ``data`` is what the texts are called."""
        if not self.texts:
            return
        longer = f"{self.texts:,} of {self.of:,} texts {'is' if self.texts == 1 else 'are'} longer"
        lost = "1 token is" if self.tokens == 1 else f"{self.tokens:,} tokens are"
        way_out = "the model has no positions for more" if self.limited else "a larger --length keeps more"
        note(f"{data}: {longer} than {self.length} tokens; {lost} left out ({way_out})")


def count_cut(loaded: Loaded, texts: Sequence[str], *, length: int) -> Cut:
    """What is left out of the texts where ``length`` tokens of each are asked for."""
    longest = loaded.length(length)
    beyond: list[int] = []
    for start in range(0, len(texts), CHUNK):
        tokens = loaded.tokenizer(list(texts[start : start + CHUNK]), verbose=False)["input_ids"]
        beyond += [len(row) - longest for row in tokens if len(row) > longest]
    return Cut(longest, len(beyond), sum(beyond), len(texts), limited=longest == loaded.longest)
