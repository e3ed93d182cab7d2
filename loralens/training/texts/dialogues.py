"""Dialogues as tokens, and which of these are learned: completions, and every answer of the assistant."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from loralens.errors import FormatError, LoraLensError, OptionError

ROLE = "assistant"
SUBSTITUTES = ("0", "a")  # contents that have nothing in common, so that one of them differs from any other at its ends
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
            start, stop = _answer_place(tokenizer, messages, number, tokens)
            learned[start:stop] = [True] * (stop - start)
    return tokens, learned


def _answer_place(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], number: int, tokens: Sequence[int]
) -> tuple[int, int]:
    """The first token of an answer in those of its conversation, and the first token after its end."""
    # An answer reaches from where the template asks for it to the end of the conversation up to it.
    ended = _template_tokens(tokenizer, messages[: number + 1])
    start, stop = _start(tokenizer, messages[: number + 1], tokens), _common(ended, tokens)
    if stop == len(ended):
        return start, stop
    # The template renders the answer in another way when it is not the last: those of Qwen3 and of other models that
    # think then leave the thoughts out. What the conversation holds of the answer is what another answer changes.
    content = _content_place(tokenizer, messages, number, tokens)
    if content is None:
        return start, stop
    # An earlier answer that is rendered in another way would be taken as the beginning of this one.
    before = _content_place(tokenizer, messages, number - 1, tokens) if number else None
    if before is not None and start < before[1]:
        start = content[0]
    return start, max(stop, content[1] + _end_length(tokenizer, ended, tokens[content[1] :]))


def _content_place(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], number: int, tokens: Sequence[int]
) -> tuple[int, int] | None:
    """The first token of the content of a message, and the first token after it; None if it is not in the tokens."""
    before, message, after = messages[:number], messages[number], messages[number + 1 :]
    others = [
        _template_tokens(tokenizer, [*before, {**message, "content": content}, *after]) for content in SUBSTITUTES
    ]
    others = [other for other in others if other != tokens]
    if not others:
        return None
    start = min(_common(other, tokens) for other in others)
    rest = min(_common(other[::-1], tokens[::-1]) for other in others)
    return start, max(start, len(tokens) - rest)


def _end_length(tokenizer: Any, ended: Sequence[int], following: Sequence[int]) -> int:
    """The number of tokens after the content of an answer that end it.

    ``ended`` are the tokens of a conversation that ends with the answer, and ``following`` are those after its content.
    """
    for size in range(min(len(ended), len(following)), 0, -1):
        if ended[-size:] == following[:size]:
            return size
    # The last answer may have an end of its own, such as the <|return|> of gpt-oss in place of <|end|>.
    special = set(tokenizer.all_special_ids)
    return int(ended[-1] in special and following[:1] != [] and following[0] in special)


def _start(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tokens: Sequence[int]) -> int:
    """The number of tokens before the answer that ends the messages, with the beginning that the template gives it."""
    *before, answer = messages
    if before:
        return _common(_template_tokens(tokenizer, before, ask=True), tokens)
    # Nothing asks for an answer that begins a conversation. Its beginning is what it has in common with two other
    # answers in its place.
    substitutes = ({**answer, "content": content} for content in SUBSTITUTES)
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
