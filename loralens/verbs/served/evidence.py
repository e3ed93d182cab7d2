"""What a server answers: which questions are asked, and the answers of a server, of a file and of a local model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralens.analysis.liveness import Changes, rms
from loralens.core.adapter import Adapter
from loralens.core.messages import note, progress
from loralens.core.stored import parse_json
from loralens.errors import FormatError, OptionError, place
from loralens.formats.files.atomic import atomic_file
from loralens.formats.files.json_text import finite_number
from loralens.formats.files.outside import open_stream
from loralens.serving.server import Question, Server
from loralens.verbs.models.models import ModelSource, model_label, restore_settings
from loralens.verbs.served.predictions import LocalModel, groups_of, questions_of, vary

REQUESTS = 16  # by default, those for the base and the repeats included
REPEATS = 2  # of these, so many ask for something again
LENGTH = 48  # tokens of a prompt
NEXT = 20  # tokens whose probabilities as the next one are asked for


@dataclass
class Evidence:
    """Questions, and the served changes of their tokens."""

    questions: list[Question]
    served: list[NDArray[np.float64]]
    noise: float | None
    base: list[NDArray[np.float64]] | None  # the answers of the server's base
    requests: int
    where: str


def choose(
    local: LocalModel,
    adapter: Adapter,
    texts: Sequence[str],
    server: Server | None,
    requests: int,
    *,
    asks_base: bool = True,
) -> list[Question]:
    """The questions whose answers the adapter changes most, as many as the requests allow."""
    questions = questions_of(local, texts, length=LENGTH)
    if not questions:
        raise OptionError("no text has four tokens", fix="give longer texts")
    many = max(2, (requests - (REPEATS if server else 0)) // (2 if asks_base else 1))
    groups = groups_of(adapter)
    with progress("choosing prompts", 1 + len(groups)) as step:
        plain = local.answers(questions, None)
        if step:
            step(1)
        without = []
        for names in groups.values() if len(groups) > 1 else ([],):
            off = vary(adapter, dict.fromkeys(names, 0.0))
            without.append(local.answers(questions, off))
            if step:
                step(1)
        live = local.answers(questions, adapter)
    if server is not None and not server.gives_prompt:
        return _next_token_questions(local, adapter, questions, plain, live, many)
    # A prompt counts by the predicted change of the group that it shows least, relative to all prompts, so that small
    # groups are seen too.
    value = np.zeros(len(questions))
    for partial in without:
        squares = np.array([float(((a - b) ** 2).sum()) for a, b in zip(live, partial, strict=True)])
        value += squares / max(float(squares.sum()), 1e-300)
    order = np.argsort(-value, kind="stable")[:many]
    chosen = [questions[i] for i in order]
    return [Question(one.ids, one.text, local.likely_next(one.ids, adapter, NEXT)) for one in chosen]


def _next_token_questions(
    local: LocalModel,
    adapter: Adapter,
    questions: Sequence[Question],
    plain: Changes,
    live: Changes,
    many: int,
) -> list[Question]:
    """Prefixes of the prompts behind which the adapter changes the next token most: for servers without prompts."""
    places = sorted(
        (
            (-abs(float(change)), prompt, last)
            for prompt, (a, b) in enumerate(zip(live, plain, strict=True))
            for last, change in enumerate(a - b)
            if last >= 3
        ),
    )
    chosen: list[Question] = []
    used: set[int] = set()
    for _, prompt, last in places:
        if prompt in used:
            continue  # one place of a prompt, so that the answers are independent
        ids = questions[prompt].ids[: last + 1]
        text = local.text(ids)
        used.add(prompt)
        chosen.append(Question(ids, text, local.likely_next(ids, adapter, NEXT)))
        if len(chosen) == many:
            break
    return chosen


def base_name_of(server: Server, name: str) -> str | None:
    """The name under which a server answers as the base of an adapter; None if it does not say."""
    listed = server.models()
    parents = {one.parent for one in listed if one.name == name}
    bases = [one.name for one in listed if one.parent is None and one.name != name]
    return next((base for base in bases if base in parents), bases[0] if len(bases) == 1 else None)


def ask_server(server: Server, name: str, base_name: str | None, questions: list[Question]) -> Evidence:
    """The answers of a server for the adapter and for its base, and some of them again."""
    count = len(questions)
    total = count * (1 if base_name is None else 2) + min(REPEATS, count)
    if not server.gives_prompt:
        note(f"{server.kind} answers for one token a request: {total} requests", "--requests N changes the number")
    with place(server.connection.url), progress("asking the server", total) as step:

        def ask(question: Question, of: str) -> NDArray[np.float64]:
            found = server.ask(question, of).numbers(question)
            if step:
                step(1)
            return found

        adapted = [ask(question, name) for question in questions]
        plain = None if base_name is None else [ask(question, base_name) for question in questions]
        again = [ask(question, name) for question in questions[:REPEATS]]
    # A served change has the noise of two answers: that of the adapter and that of the base.
    repeated = [a - b for a, b in zip(again, adapted, strict=False)]
    noise = rms([one[np.isfinite(one)] for one in repeated])
    where = f"{server.kind}{' ' + server.version if server.version else ''}"
    return Evidence(questions, adapted, noise, plain, server.requests, where)


def run_other(
    local: LocalModel, against: ModelSource, questions: list[Question], *, device: str, dtype: str, threads: int | None
) -> Evidence:
    """The answers of a local model that should have the adapter in it; its base is the local one."""
    with restore_settings(against):
        other = LocalModel(against, device=device, dtype=dtype, threads=threads)
        answers = other.answers(questions, None)
    # Both compute here, so the base of the other one is the local one.
    return Evidence(questions, answers, None, local.answers(questions, None), 0, model_label(against))


def read_recorded(vocabulary: int, path: Path) -> Evidence:
    """Recorded log-probabilities: lines of ids, logprobs and, if there are any, base_logprobs."""
    questions, adapted, plain = [], [], []
    with open_stream(path) as stream:
        for count, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            with place(f"{path}, line {count}"):
                try:
                    entry: Any = parse_json(line)
                except ValueError as error:
                    raise FormatError("is no JSON", fix="write one object for each line") from error
                ids = entry.get("ids") if isinstance(entry, dict) else None
                if (
                    not isinstance(ids, list)
                    or len(ids) < 4
                    or not all(type(one) is int and 0 <= one < vocabulary for one in ids)
                ):
                    raise FormatError(
                        "ids is not a list of at least four tokens of the base", fix="write what --write-prompts gives"
                    )
                questions.append(Question(tuple(ids), ""))
                adapted.append(_numbers(entry, "logprobs", len(ids)))
                if entry.get("base_logprobs") is not None:
                    plain.append(_numbers(entry, "base_logprobs", len(ids)))
    if not questions:
        raise FormatError(f"{path} has no lines", fix="write one object for each prompt")
    if plain and len(plain) != len(questions):
        raise FormatError(f"{path}: only {len(plain)} of {len(questions)} lines have base_logprobs", fix="record all")
    return Evidence(questions, adapted, None, plain or None, 0, str(path))


def _numbers(entry: Mapping[str, Any], key: str, tokens: int) -> NDArray[np.float64]:
    values = entry.get(key)
    # Servers give one entry for each token, and the first is empty.
    if isinstance(values, list) and len(values) == tokens:
        values = values[1:]
    if not isinstance(values, list) or len(values) != tokens - 1:
        raise FormatError(
            f"{key} has not one number for each token after the first", fix=f"record {tokens - 1} log-probabilities"
        )
    found = [finite_number(value) for value in values]
    if all(value is None for value in found):
        raise FormatError(f"{key} holds no log-probabilities", fix=f"record {tokens - 1} log-probabilities")
    if any(value is not None and value > 1e-3 for value in found):
        raise FormatError(f"{key} holds numbers above 0", fix="record natural logarithms of probabilities")
    return np.array([np.nan if value is None else value for value in found], np.float64)


def write_questions(questions: Sequence[Question], target: Path) -> None:
    """Write prompts as a file of JSON lines, and say what to do with it."""
    lines = [json.dumps({"ids": list(one.ids), "text": one.text}, ensure_ascii=False) for one in questions]
    with atomic_file(target) as stream:
        stream.write(("\n".join(lines) + "\n").encode())
    note(
        f"{target}: {len(lines)} prompts",
        "ask for each as the adapter and as the base, add logprobs and base_logprobs, and give the file as --outputs",
    )
