"""Texts and dialogues as tokens, and which of these are learned: completions, and the answers of the assistant."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

from loralens.core.messages import warn
from loralens.errors import FormatError, LoraLensError, OptionError, place
from loralens.training.tasks import Examples

Dialogue = Mapping[str, Any]
ROLE = "assistant"
MARK = "{% generation"  # in a chat template that says itself what the assistant has written


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
        The chat template refuses messages, or does not show where an answer is.
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
    return Examples(tokens, tokenizer.pad_token_id, labels, learned=learned)


def encode_text(tokenizer: Any, text: str | Dialogue, *, mask_prompt: bool = True) -> tuple[list[int], list[bool]]:
    """All tokens of a text or a dialogue, and which are learned.

    A dialogue has ``prompt`` and ``completion``, which are strings or lists of messages, or ``messages``; and ``tools``
    where it has any. A message with the weight 0 is not learned.
    """
    if isinstance(text, str):
        # verbose=False: the tokenizer would warn of every long text.
        tokens = list(tokenizer(text, verbose=False)["input_ids"])
        spans = [(0, len(tokens))]
    elif "messages" in text:
        tokens, spans = _encode_messages(tokenizer, text, masked=mask_prompt)
    elif isinstance(text["prompt"], str):
        # A model that never sees the end of an answer does not learn to stop.
        end, completion = tokenizer.eos_token or "", text["completion"]
        completion = completion if end and completion.endswith(end) else completion + end
        # Together, since a token may reach over the boundary: it then belongs to the completion.
        tokens = tokenizer(text["prompt"] + completion, verbose=False)["input_ids"]
        spans = [(_common(tokenizer(text["prompt"], verbose=False)["input_ids"], tokens), len(tokens))]
    else:
        tokens = _template(tokenizer, text, [*text["prompt"], *text["completion"]])["input_ids"]
        prompt = _template(tokenizer, text, text["prompt"], add_generation_prompt=True)["input_ids"]
        spans = [(_common(prompt, tokens), len(tokens))]
    learned = [not mask_prompt] * len(tokens)
    for start, stop in spans:
        learned[start:stop] = [True] * len(learned[start:stop])
    return tokens, learned


def _encode_messages(tokenizer: Any, dialogue: Dialogue, *, masked: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens of a conversation, and where its answers are, each with the end that the template gives it."""
    messages = dialogue["messages"]
    if not masked:
        return _template(tokenizer, dialogue, messages)["input_ids"], []
    answers = [number for number, message in enumerate(messages) if message["role"] == ROLE]
    if _is_marked(_training_template(tokenizer)):
        encoded = _template(tokenizer, dialogue, messages, return_assistant_tokens_mask=True)
        tokens, spans, place_ = list(encoded["input_ids"]), [], 0
        for mine, run in groupby(encoded["assistant_masks"]):
            size = len(list(run))
            spans += [(place_, place_ + size)] if mine else []
            place_ += size
    else:
        tokens = _template(tokenizer, dialogue, messages)["input_ids"]
        spans = [_answer_place(tokenizer, dialogue, number, tokens) for number in answers]
    weights = [messages[number].get("weight", 1) for number in answers]
    if all(weight == 1 for weight in weights):
        return tokens, spans
    if len(spans) != len(answers) or not set(weights) <= {0, 1}:
        raise FormatError("the weights of its messages cannot be kept", fix="give weights of 0 and 1, or none")
    return tokens, [span for span, weight in zip(spans, weights, strict=True) if weight]


def _answer_place(tokenizer: Any, dialogue: Dialogue, number: int, tokens: list[int]) -> tuple[int, int]:
    """The first token of an answer, and the first after its end: from where the template asks for it to its end."""
    *before, answer = dialogue["messages"][: number + 1]
    ended = _template(tokenizer, dialogue, [*before, answer])["input_ids"]
    if before:
        start = _common(_template(tokenizer, dialogue, before, add_generation_prompt=True)["input_ids"], tokens)
    else:
        # Nothing asks for an answer that begins a conversation. Two other answers have no letter in common.
        others = ([{**answer, "content": content}] for content in ("0", "a"))
        start = min(_common(_template(tokenizer, dialogue, other)["input_ids"], tokens) for other in others)
    if tokens[: len(ended)] != ended:
        raise FormatError(
            "its chat template shows an answer in another way where more follows, so that the answer is not found",
            fix="mark answers in the template by {% generation %}, or learn every token: --no-mask-prompt",
        )
    return start, len(ended)


def _is_marked(template: str) -> bool:
    return MARK in template.replace("{%-", "{%")


@lru_cache(maxsize=4)
def _training_template(tokenizer: Any) -> str:
    """The chat template that marks the answers, where TRL knows one for this tokenizer; else its own."""
    template = str(tokenizer.chat_template or "")
    try:
        from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained

        template = get_training_chat_template(tokenizer) or template
        if _is_marked(template) and not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
            warn(
                "the chat template does not mark the end of an answer, so that the model may not learn to stop",
                "put the end inside of {% generation %} … {% endgeneration %}",
            )
    # Without TRL, or for a template that TRL does not know, which fails in many ways.
    except Exception:  # noqa: BLE001
        return template
    return template


def _template(
    tokenizer: Any, dialogue: Dialogue, messages: Sequence[Mapping[str, Any]], **options: bool
) -> Mapping[str, Any]:
    """The tokens of messages in the chat template."""
    if not tokenizer.chat_template:
        raise OptionError(
            "the tokenizer has no chat template, which messages need",
            fix="copy the chat_template.jinja of the model into its folder, or give prompts and completions as strings",
        )
    try:
        encoded: Mapping[str, Any] = tokenizer.apply_chat_template(
            [{name: value for name, value in message.items() if name != "weight"} for message in messages],
            tools=dialogue.get("tools"),
            chat_template=_training_template(tokenizer),
            tokenize=True,
            return_dict=True,
            **options,
        )
    except LoraLensError:
        raise
    # A template is a program of the model's authors, which may raise anything.
    except Exception as error:
        what = f"the chat template refuses the messages: {str(error).splitlines()[0] if str(error) else type(error)}"
        raise FormatError(what, fix="give the roles and the parts of messages that the model knows") from error
    return encoded


def _common(these: Sequence[int], those: Sequence[int]) -> int:
    """The number of first tokens that both have in common."""
    pairs = zip(these, those, strict=False)
    return next((n for n, (mine, theirs) in enumerate(pairs) if mine != theirs), min(len(these), len(those)))
