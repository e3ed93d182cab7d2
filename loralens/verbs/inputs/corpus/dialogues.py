"""Instruction data: prompts with completions, and conversations, as records of a file or of a list."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralens.errors import FormatError

ROLE = "assistant"  # of the messages that are learned
_FIX = 'write {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'

# {"prompt": …, "completion": …} with two strings or two lists of messages, or {"messages": [{"role", "content"}, …]}.
Dialogue = dict[str, Any]


def dialogue_of(record: Mapping[Any, Any]) -> Dialogue | None:
    """The dialogue of a record that has no text; None if it is not a dialogue either.

    Raises
    ------
    FormatError
        Messages without a role or a content, or nothing to learn.
    """
    if record.get("text") is not None:
        return None
    if record.get("messages") is not None:
        messages = _check_messages(record["messages"], "messages")
        if not any(message["role"] == ROLE for message in messages):
            raise FormatError(f'"messages" has no message of the {ROLE}, which would be learned', fix=_FIX)
        return {"messages": messages}
    prompt, completion = record.get("prompt"), record.get("completion")
    if prompt is None or completion is None:
        return None
    if isinstance(prompt, str) != isinstance(completion, str):
        what = '"prompt" and "completion" are of two kinds'
        raise FormatError(what, fix="give two strings, or two lists of messages")
    if not isinstance(prompt, str):
        return {name: _check_messages(record[name], name) for name in ("prompt", "completion")}
    for name, text in (("prompt", prompt), ("completion", completion)):
        _check_characters(text, name)
    if not completion.strip():
        raise FormatError('"completion" is empty', fix="give every prompt a completion, or remove the line")
    return {"prompt": prompt, "completion": completion}


def _check_messages(messages: Any, name: str) -> list[dict[str, Any]]:
    """The messages as dictionaries, after a check that each has a role and a content."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise FormatError(f'"{name}" is not a list of messages', fix=_FIX)
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise FormatError(f'message {number} of "{name}" has no "role"', fix=_FIX)
        content = message.get("content")
        # A call of a tool may have no content.
        if not isinstance(content, str) and not message.get("tool_calls"):
            raise FormatError(f'message {number} of "{name}" has no "content" that is a text', fix=_FIX)
        _check_characters(content or "", name)
    # What is null is not there; a chat template may take the null itself for content.
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def _check_characters(text: str, name: str) -> None:
    # JSON can escape half of a surrogate pair, which no tokenizer accepts.
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        what = f'"{name}" has half a surrogate pair, which is not a character'
        raise FormatError(what, fix="write the text again, as UTF-8")
