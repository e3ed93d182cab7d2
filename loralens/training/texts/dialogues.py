"""Dialogues as tokens, and which of these are learned: completions, and every answer of the assistant."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from loralens.errors import FormatError, LoraLensError, OptionError

ROLE = "assistant"
MARK = "{% generation"  # in a chat template that says itself what the assistant has written


class Encoded(NamedTuple):
    """The tokens of a dialogue, and for each whether it is learned."""

    tokens: list[int]
    learned: list[bool]


def encode_dialogue(tokenizer: Any, dialogue: Mapping[str, Any], *, mask_prompt: bool = True) -> Encoded:
    """The tokens of a prompt with its completion, or of messages in the chat template of the tokenizer.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    dialogue : mapping
        ``prompt`` and ``completion``, which are strings or lists of messages, or ``messages``.
    mask_prompt : bool
        Whether only the completion, or what the assistant has said, is learned; otherwise every token is.

    Raises
    ------
    OptionError
        The tokenizer has no chat template.
    FormatError
        The template refuses the messages.
    """
    if "messages" in dialogue:
        tokens, learned = _encode_messages(tokenizer, dialogue["messages"])
    else:
        tokens, begun = _encode_completion(tokenizer, dialogue["prompt"], dialogue["completion"])
        learned = [number >= begun for number in range(len(tokens))]
    return Encoded(tokens, learned if mask_prompt else [True] * len(tokens))


def _encode_completion(tokenizer: Any, prompt: Any, completion: Any) -> tuple[list[int], int]:
    """The tokens of prompt and completion together, and the number of tokens before the completion."""
    if not isinstance(prompt, str):
        tokens = _template_tokens(tokenizer, [*prompt, *completion])
        return tokens, _common(_template_tokens(tokenizer, prompt, ask=True), tokens)
    # A model that never sees the end of an answer does not learn to stop.
    end = tokenizer.eos_token or ""
    completion = completion if end and completion.endswith(end) else completion + end
    # Together, since a token may reach over the boundary: it then belongs to the completion.
    tokens = tokenizer(prompt + completion, verbose=False)["input_ids"]
    return tokens, _common(tokenizer(prompt, verbose=False)["input_ids"], tokens)


def _encode_messages(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation; all answers are learned, with the end that the template gives them."""
    if MARK in (tokenizer.chat_template or "").replace("{%-", "{%"):
        encoded = _template(tokenizer, messages, return_assistant_tokens_mask=True)
        return list(encoded["input_ids"]), [bool(mask) for mask in encoded["assistant_masks"]]
    tokens = _template_tokens(tokenizer, messages)
    learned = [False] * len(tokens)
    for number, message in enumerate(messages):
        if message["role"] == ROLE:
            # An answer reaches from where the template asks for it to the end of the conversation up to it.
            start = _start(tokenizer, messages[: number + 1], tokens)
            stop = _common(_template_tokens(tokenizer, messages[: number + 1]), tokens)
            learned[start:stop] = [True] * (stop - start)
    return tokens, learned


def _start(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tokens: Sequence[int]) -> int:
    """The number of tokens before the answer that ends the messages, with the beginning that the template gives it."""
    *before, answer = messages
    if before:
        return _common(_template_tokens(tokenizer, before, ask=True), tokens)
    # Nothing asks for an answer that begins a conversation. Its beginning is what it has in common with two other
    # answers in its place.
    substitutes = ({**answer, "content": content} for content in ("0", "a"))
    return min(_common(_template_tokens(tokenizer, [other]), tokens) for other in substitutes)


def _template_tokens(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, ask: bool = False) -> list[int]:
    """The tokens of messages; ``ask`` appends the beginning of an answer."""
    return list(_template(tokenizer, messages, add_generation_prompt=ask)["input_ids"])


def _template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: bool) -> Mapping[str, Any]:
    if not tokenizer.chat_template:
        raise OptionError(
            "the tokenizer has no chat template, which messages need",
            fix="copy the chat_template.jinja of the model into its folder, or give prompts and completions as strings",
        )
    try:
        encoded: Mapping[str, Any] = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, **options
        )
    except LoraLensError:
        raise
    # A template is a program of the model's authors, which may raise anything.
    except Exception as error:
        what = f"the chat template refuses the messages: {str(error).splitlines()[0] if str(error) else type(error)}"
        raise FormatError(
            what, fix="give the roles in the order that the model knows: user, assistant, user …"
        ) from error
    return encoded


def _common(these: Sequence[int], those: Sequence[int]) -> int:
    """The number of first tokens that both have in common."""
    for number, (mine, theirs) in enumerate(zip(these, those, strict=False)):
        if mine != theirs:
            return number
    return min(len(these), len(those))
