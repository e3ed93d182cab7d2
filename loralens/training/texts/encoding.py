"""Texts and dialogues as examples for training and evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralens.errors import OptionError, place
from loralens.training.texts.dialogues import encode_dialogue
from loralens.training.texts.tasks import Examples

Dialogue = Mapping[str, Any]


def encode_texts(
    tokenizer: Any,
    texts: Sequence[str | Dialogue],
    *,
    length: int,
    labels: Sequence[int] | None = None,
    mask_prompt: bool = True,
) -> Examples:
    """Texts as the tokens of a transformers tokenizer, cut to ``length`` tokens.

    In dialogues, only completions and answers are learned, unless ``mask_prompt`` is False.

    Raises
    ------
    OptionError
        A text has no tokens; the tokenizer has no chat template.
    FormatError
        The chat template refuses messages.
    """
    tokens: list[list[int]] = []
    learned: list[list[bool]] | None = [] if any(not isinstance(text, str) for text in texts) else None
    if learned is None:
        tokens = tokenizer(list(texts), truncation=True, max_length=length, padding=False)["input_ids"]
    else:
        for number, text in enumerate(texts, start=1):
            with place(f"text {number}"):
                row, mask = encode_text(tokenizer, text, mask_prompt=mask_prompt)
            tokens.append(row[:length])
            learned.append(mask[:length])
    for number, row in enumerate(tokens, start=1):
        if not row:
            # A model cannot run on it, and 40 characters are enough to recognise the text.
            raise OptionError(f"text {number} has no tokens: {texts[number - 1]!r:.42}", fix="remove this text")
    return Examples(
        tokens,
        tokenizer.pad_token_id,
        labels,
        mask=tokenizer.mask_token_id,
        vocabulary=len(tokenizer),
        special=frozenset(tokenizer.all_special_ids),
        learned=learned,
    )


def encode_text(tokenizer: Any, text: str | Dialogue, *, mask_prompt: bool = True) -> tuple[list[int], list[bool]]:
    """All tokens of a text or a dialogue, and which are learned."""
    if not isinstance(text, str):
        return encode_dialogue(tokenizer, text, mask_prompt=mask_prompt)
    # verbose=False: the tokenizer would warn of every long text.
    row = list(tokenizer(text, verbose=False)["input_ids"])
    return row, [True] * len(row)
