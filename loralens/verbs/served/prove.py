"""The verb ``prove``: is an adapter live where it is served, at its strength, in all of its modules?"""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from math import ceil, sqrt
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from loralens.analysis.liveness import (
    LIVE,
    Changes,
    Curve,
    FaultFit,
    GroupFit,
    Interval,
    compare_faults,
    fit_strength,
    group_strengths,
    rms,
)
from loralens.choices import FloatType
from loralens.core.adapter import Adapter
from loralens.core.fingerprint import fingerprint
from loralens.core.messages import note, progress
from loralens.core.names import natural_key, some
from loralens.errors import FormatError, LoraLensError, OptionError, place, visible
from loralens.exports import takes_options
from loralens.formats.files.atomic import atomic_file, check_write_target
from loralens.formats.files.json_text import finite_number
from loralens.formats.files.outside import open_stream
from loralens.serving.interfaces import connect
from loralens.serving.server import Question, Server
from loralens.tables.numbers import fixed, number
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Keys, Table, rows_key
from loralens.verbs.models.models import ModelSource, model_label, restore_settings
from loralens.verbs.models.texts import TextSource, read_texts
from loralens.verbs.served.predictions import (
    MOST,
    WITHOUT_BLOCK,
    LocalModel,
    alone_group,
    bank,
    check_applies,
    fine_faults,
    group_faults,
    groups_of,
    questions_of,
    scale_faults,
    vary,
    without_group,
)
from loralens.verbs.shared.adapters import AdapterSource, labels, read_adapter
from loralens.verbs.shared.options import Reading, check_counts

Verdict = Literal["live", "ignored", "other-strength", "partly", "other-adapter", "cannot-tell"]
IGNORED, FITTED = "ignored", "at the fitted strength"  # names of predictions, as `LIVE` is one
REQUESTS = 16  # by default, those for the base and the repeats included
REPEATS = 2  # of these, so many ask for something again
LENGTH = 48  # tokens of a prompt
NEXT = 20  # tokens whose probabilities as the next one are asked for
WIDE = 0.25  # an interval whose half-width is larger does not tell full strength from 0.75
FAR = 0.25  # bases that differ by a larger share of the predicted change are worth a note
RELATED = 0.15  # a larger share of unexplained change is not this adapter
# Strengths at which the local model is run for the curve; larger ones follow where the answers are stronger.
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


@dataclass(frozen=True, slots=True, repr=False)
class Proof(Tabular):
    """Whether an adapter is live on a server, at which strength, and in which modules.

    Attributes
    ----------
    verdict : str
        ``live``, ``ignored``, ``other-strength``, ``partly``, ``other-adapter`` or ``cannot-tell``.
    headline : str
        The answer in one sentence.
    strength : Interval
        The strength at which the local model predicts the served changes best, with its 95 % interval.
    groups : sequence of GroupFit
        The strength in every group of modules that the prompts can tell apart.
    blocks : sequence of GroupFit
        The same for blocks; empty where a coarser fault explains the answers.
    faults : sequence of FaultFit
        The predictions that were compared, nearest first.
    unexplained : float
        The share of the served change that the best prediction leaves, in [0, 1]: squares, over all tokens.
    predicted, served : float
        Root mean squares of the predicted and of the served change of a token, in nats.
    noise : float or None
        Standard deviation of a served change when the same is asked again, in nats; None where nothing was repeated.
    base_distance : float or None
        Root mean square of log p of the server's base and of the local base, in nats; None if the server's base was not
        asked.
    prompts, requests : int
        How many prompts were compared, and how many requests the server answered.
    points : ndarray of float64, shape (tokens, 3)
        The change of every token as predicted at strength 1, as predicted at the fitted strength, and as served.
    """

    adapter: str
    base: str
    where: str
    verdict: Verdict
    headline: str
    strength: Interval
    groups: Sequence[GroupFit]
    blocks: Sequence[GroupFit]
    faults: Sequence[FaultFit]
    unexplained: float
    predicted: float
    served: float
    noise: float | None
    base_distance: float | None
    prompts: int
    requests: int
    notes: Sequence[str] = ()
    points: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 3)))

    @property
    def answer(self) -> bool:
        """Whether it is live in all groups."""
        return self.verdict == "live"

    @property
    def undecided(self) -> bool:
        """Whether this cannot be told."""
        return self.verdict == "cannot-tell"

    def conclusion(self) -> list[str]:
        """The answer."""
        return [self.headline]

    def sentences(self) -> list[str]:
        """How it was measured."""
        floors = [
            *([] if self.noise is None else [f"the same asked again by {number(self.noise)}"]),
            *([] if self.base_distance is None else [f"the two bases by {number(self.base_distance)}"]),
        ]
        differ = f" Noise: {', '.join(floors)}." if floors else ""
        return [
            f"Change of log p of a token: {number(self.served)} nats on {self.where}, {number(self.predicted)} "
            f"predicted.{differ} {self.prompts} prompts, {self.requests} requests.",
            *self.notes,
        ]

    def tables(self) -> list[Table[Any]]:
        """The groups of modules, and the predictions."""
        return [
            Table("strength in groups of modules", GROUPS, self.groups),
            Table("predictions, nearest first", FAULTS, self.faults[:6]),
        ]

    def details_of_blocks(self) -> list[Table[Any]]:
        """The strength in every block, which ``--verbose`` shows."""
        return [Table("strength in blocks", GROUPS, self.blocks)]

    def metrics(self) -> str:
        """Strength and verdict as one line of Prometheus's text format."""
        labels = {"adapter": self.adapter, "server": self.where, "verdict": self.verdict}
        quoted = [
            f'{name}="{value.translate(ESCAPES)}"' for name, value in ((k, visible(v)) for k, v in labels.items())
        ]
        return f"loralens_adapter_strength{{{','.join(quoted)}}} {self.strength.value:.6g}"

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "adapter",
            "base",
            "where",
            "verdict",
            "headline",
            "strength",
            rows_key("groups", GROUPS),
            Column("blocks", "blocks"),
            Column("faults", "faults"),
            "unexplained",
            Column("predicted_change", "predicted"),
            Column("served_change", "served"),
            "noise",
            "base_distance",
            "prompts",
            "requests",
            "notes",
        )


ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})  # in the values of Prometheus's labels
GROUPS: tuple[Column[GroupFit], ...] = (
    Column("group", lambda row: " + ".join(row.groups), "group", align="left", priority=ALWAYS, type=str),
    Column("strength", "strength.value", "strength", fixed(".2f"), priority=ALWAYS),
    Column("low", "strength.low", "low", fixed(".2f"), priority=ALWAYS),
    Column("high", "strength.high", "high", fixed(".2f"), priority=ALWAYS),
)
FAULTS: tuple[Column[FaultFit], ...] = (
    Column("name", "name", "the adapter", align="left", priority=ALWAYS),
    Column("distance", "distance", "distance (nats)", number, priority=ALWAYS),
    Column("possible", lambda row: "yes" if row.possible else "no", "possible", align="left", priority=ALWAYS),
)


@dataclass
class Evidence:
    """Questions, and the served changes of their tokens."""

    questions: list[Question]
    served: list[NDArray[np.float64]]
    noise: float | None
    base: list[NDArray[np.float64]] | None  # the answers of the server's base
    requests: int
    where: str


@takes_options
def prove(
    adapter: AdapterSource,
    *,
    base: ModelSource,
    server: str | None = None,
    model: str | None = None,
    base_name: str | None = None,
    outputs: str | PathLike[str] | None = None,
    against: ModelSource | None = None,
    write_prompts: str | PathLike[str] | None = None,
    data: TextSource | None = None,
    siblings: Sequence[AdapterSource] = (),
    fleet: str | PathLike[str] | None = None,
    requests: int = REQUESTS,
    interface: str | None = None,
    timeout: float = 120.0,
    device: str = "auto",
    dtype: FloatType = "f32",
    threads: int | None = None,
    overwrite: bool = False,
    reading: Reading,
) -> Proof | None:
    """Prove that a server applies an adapter: at its strength, and in all of its modules.

    The changes of log-probabilities that the server shows between the adapter and its base are compared with those that
    a local model predicts, on the same tokens: for the adapter as it is, at other strengths, without groups of modules,
    and for other adapters. The exit code is 0 if it is live in all groups, 1 if it is not, and 3 if it cannot be told.

    Parameters
    ----------
    adapter : path or Adapter
    base : path or (model, tokenizer)
        The base model: a transformers folder, a GGUF file, a Hub id in the local cache, or an installed package.

        If the server has a quantised base, give the server's own file, or its rounding is taken for the adapter.
    server : str, optional
        The address of the server, such as http://127.0.0.1:8000. Nothing else is contacted.
    model : str, optional
        The name of the adapter on the server, as loralens served lists it.
    base_name : str, optional
        The name of the base on the server. [default: the parent that the server states]
    outputs : path, optional
        In place of a server: a .jsonl file of {"ids": …, "logprobs": …, "base_logprobs": …}, one line for a prompt.
    against : path or (model, tokenizer), optional
        In place of a server: a local model that should have the adapter in it.
    write_prompts : path, optional
        Write what a server should be asked to this .jsonl file, and stop.
    data : path or iterable, optional
        Texts to ask for, in place of the built-in ones.
    siblings : sequence of path or Adapter
        Other adapters that the server may have taken for this one.
    fleet : path, optional
        The home of an index of adapters: those that fit the base are siblings too.
    requests : int
        The largest number of requests.
    interface : str, optional
        The interface of the server: vllm, sglang, llama.cpp, lorax, ollama or openai. [default: the server is asked]
    timeout : float
        The number of seconds after which a request is given up.
    device : str
        The device that runs the local model: cpu, cuda, cuda:1, mps …, or auto for a GPU if there is one.
    dtype : str
        The dtype of the local model's weights, in which it computes.
    threads : int, optional
        The number of CPU threads. [default: all that the process may use]
    overwrite : bool
        Replace what is already at the path of write_prompts.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Returns
    -------
    Proof
        None with ``write_prompts``.

    Raises
    ------
    OptionError
        Not exactly one of server, outputs, against and write_prompts is given; the server cannot be reached or has no
        such name; torch is not installed.
    FormatError
        The adapter, the base or the answers cannot be read.
    MismatchError
        The adapter does not fit the base.

    Notes
    -----
    Let s be the log-probabilities of the server and p those of the local model. The served change is
    s(adapter) − s(base), or s(adapter) − p(base) where the server has no name for its base. The strength is that at
    which p(strength) − p(base) is nearest to it (least squares), with an interval from a bootstrap over prompts. The
    server sees only the tokens of the prompts.

    Examples
    --------
    $ loralens prove adapter --base model --server http://127.0.0.1:8000 --model my-adapter
    $ loralens prove adapter --base model --against merged
    """
    check_counts(requests=requests, threads=threads)
    given = [
        name
        for name, value in (
            ("--server", server),
            ("--outputs", outputs),
            ("--against", against),
            ("--write-prompts", write_prompts),
        )
        if value is not None
    ]
    if len(given) != 1:
        what = f"{' and '.join(given)} are given" if given else "nothing says where the adapter is served"
        raise OptionError(what, fix="give one of --server URL, --outputs FILE, --against MODEL, --write-prompts FILE")
    if server is not None and model is None:
        raise OptionError(
            "--model is missing: the name of the adapter on the server", fix=f"see the names: loralens served {server}"
        )
    target = None if write_prompts is None else Path(write_prompts)
    if target:
        check_write_target(target, [], folder=False, overwrite=overwrite)
    with restore_settings(base):
        chosen = [adapter, *siblings]
        names = [
            label if isinstance(source, Adapter) else str(source)
            for source, label in zip(chosen, labels(chosen), strict=True)
        ]
        path = None if isinstance(base, tuple) else base
        read, *others = [
            read_adapter(source, reading, base=path, applies_all=True, label=name)
            for source, name in zip(chosen, names, strict=True)
        ]
        # The address is tried first, since loading a model may take minutes.
        served = None if server is None else connect(server, kind=interface, timeout=timeout)
        local = LocalModel(base, device=device, dtype=dtype, threads=threads)
        check_applies(local, read, names[0])
        if served is not None and hasattr(served, "token_ids"):
            served.token_ids = local.token_ids()
        if outputs is not None:
            evidence = _recorded(len(local.loaded.tokenizer), Path(outputs))
        else:
            texts = bank() if data is None else [text.text for text in read_texts(data)]
            questions = choose(
                local, read, texts, served, requests, asks_base=base_name is not None or served is not None
            )
            if target:
                _write_questions(questions, target)
                return None
            if served is not None:
                evidence = _ask(served, str(model), base_name, questions)
            else:
                assert against is not None
                evidence = _run(local, against, questions, device=device, dtype=dtype, threads=threads)
        known = dict(zip(names[1:], others, strict=True)) | (_of_fleet(fleet, local, read) if fleet else {})
        return judge(local, read, evidence, siblings=known, adapter_label=names[0])


def _of_fleet(home: str | PathLike[str], local: LocalModel, adapter: Adapter) -> dict[str, Adapter]:
    """The members of a fleet that fit the base, without the adapter itself."""
    from loralens.core.attached import Attachment
    from loralens.verbs.fleets.fleet_verbs import open_fleet

    index, own, found = open_fleet(home), fingerprint(adapter), {}
    for member in index.members():
        if member.fingerprint == own:
            continue
        try:
            sibling = index.adapter(member)
            Attachment(local.loaded.model, sibling)
        except LoraLensError:
            continue  # for another base, or changed since it was indexed
        found[member.name] = sibling
    return found


def choose(
    local: LocalModel,
    adapter: Adapter,
    texts: Sequence[str],
    server: Server | None,
    requests: int,
    *,
    asks_base: bool,
) -> list[Question]:
    """The questions whose answers the adapter changes most, as many as the requests allow."""
    questions = questions_of(local, texts, length=LENGTH)
    if not questions:
        raise OptionError("no text has four tokens", fix="give longer texts")
    per_prompt = 2 if asks_base else 1
    many = max(2, (requests - REPEATS) // per_prompt) if server is not None else REQUESTS // 2
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


def _ask(server: Server, name: str, base_name: str | None, questions: list[Question]) -> Evidence:
    """The answers of a server for the adapter and for its base, and some of them again."""
    listed = server.models()
    names = {one.name for one in listed}
    parents = [one.parent for one in listed if one.name == name and one.parent]
    if base_name is None:
        bases = [one.name for one in listed if one.parent is None]
        base_name = next((p for p in parents if p in names), bases[0] if len(bases) == 1 and bases[0] != name else None)
    count = len(questions)
    total = count * (1 if base_name is None else 2) + min(REPEATS, count)
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
    noise = rms([a - b for a, b in zip(again, adapted, strict=False)])
    where = f"{server.kind}{' ' + server.version if server.version else ''}"
    return Evidence(questions, adapted, noise, plain, server.requests, where)


def _run(
    local: LocalModel, against: ModelSource, questions: list[Question], *, device: str, dtype: str, threads: int | None
) -> Evidence:
    """The answers of a local model that should have the adapter in it; its base is the local one."""
    with restore_settings(against):
        other = LocalModel(against, device=device, dtype=dtype, threads=threads)
        answers = other.answers(questions, None)
    # Both compute here, so the base of the other one is the local one.
    return Evidence(questions, answers, None, local.answers(questions, None), 0, model_label(against))


def _recorded(vocabulary: int, path: Path) -> Evidence:
    """Recorded log-probabilities: lines of ids, logprobs and, if there are any, base_logprobs."""
    questions, adapted, plain = [], [], []
    with open_stream(path) as stream:
        for count, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            with place(f"{path}, line {count}"):
                try:
                    entry: Any = json.loads(line)
                except (ValueError, RecursionError) as error:
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
    if any(value is not None and value > 1e-3 for value in found):
        raise FormatError(f"{key} holds numbers above 0", fix="record natural logarithms of probabilities")
    return np.array([np.nan if value is None else value for value in found], np.float64)


def _write_questions(questions: Sequence[Question], target: Path) -> None:
    lines = [json.dumps({"ids": list(one.ids), "text": one.text}, ensure_ascii=False) for one in questions]
    with atomic_file(target) as stream:
        stream.write(("\n".join(lines) + "\n").encode())
    note(
        f"{target}: {len(lines)} prompts",
        "ask for each as the adapter and as the base, add logprobs and base_logprobs, and give the file as --outputs",
    )


def judge(
    local: LocalModel,
    adapter: Adapter,
    evidence: Evidence,
    *,
    siblings: Mapping[str, Adapter],
    adapter_label: str,
) -> Proof:
    """Compare the served changes with the predicted ones, and say what they mean."""
    questions = evidence.questions
    plain = local.answers(questions, None)
    reference = plain if evidence.base is None else evidence.base
    served = [a - b for a, b in zip(evidence.served, reference, strict=True)]
    seen = [np.isfinite(one) for one in served]
    served = [one[mask] for one, mask in zip(served, seen, strict=True)]
    asked = list(zip(questions, seen, strict=True))

    def change(variant: Adapter | None) -> list[NDArray[np.float64]]:
        if variant is None or (not len(variant) and not variant.extra):
            return [one * 0 for one in served]
        answers = local.answers(questions, variant)
        return [(a - b)[mask] for a, b, mask in zip(answers, plain, seen, strict=True)]

    def changes(variants: Mapping[str, Adapter | None], what: str) -> dict[str, Changes]:
        found: dict[str, Changes] = {}
        with progress(what, len(variants)) as step:
            for name, variant in variants.items():
                found[name] = change(variant)
                if step:
                    step(1)
        return found

    base_distance = None
    if evidence.base is not None:
        base_distance = rms([(a - b)[mask] for a, b, mask in zip(evidence.base, plain, seen, strict=True)])
    # A served change has the noise of two answers. Where the bases compute differently, by 16 bits or by other codes,
    # repeating a question does not show it, and the distance of the bases does.
    noise = max((evidence.noise or 0.0) * sqrt(2), base_distance or 0.0)
    curve = _curve(changes({f"{each:g}": vary(adapter, each) for each in STRENGTHS}, "predicting strengths"))
    strength = fit_strength(served, curve, noise=noise)
    while strength.value == curve.strengths[-1] < MOST:
        curve = curve.extended(farther := 1.5 * curve.strengths[-1], change(vary(adapter, farther)))
        strength = fit_strength(served, curve, noise=noise)
    if evidence.base is None:
        # Nothing else shows how differently the server computes.
        noise = max(noise, rms(_difference(served, curve.at(strength.value))))
        strength = fit_strength(served, curve, noise=noise)
    told = _without_prompts(evidence, served, curve, [int(mask[: len(q.ids) - 1].sum()) for q, mask in asked], noise)
    if told:
        remaining, finding = told
        proof = judge(local, adapter, remaining, siblings=siblings, adapter_label=adapter_label)
        return replace(proof, notes=[finding, *proof.notes])
    live = curve.at(1.0)
    groups = groups_of(adapter)
    partial = changes(group_faults(adapter), "predicting groups of modules")
    others = changes({f"the adapter {name}": one for name, one in siblings.items()}, "predicting other adapters")
    faults: dict[str, Changes] = {LIVE: live, IGNORED: [0 * one for one in live], FITTED: curve.at(strength.value)}
    faults |= {**changes(scale_faults(adapter), "predicting faults of the scale"), **partial, **others}
    fits, visible = compare_faults(served, faults, noise=noise)
    fine: dict[str, Changes] = {}
    blocks: list[GroupFit] = []
    # These take a forward pass for each block, so only where a coarser prediction does not explain the answers already.
    named = any(fit.possible and fit.name in visible and fit.name != FITTED for fit in fits)
    if IGNORED in visible and not named:
        fine = changes(fine_faults(adapter), "predicting blocks and kinds of modules")
        faults |= fine
        fits, visible = compare_faults(served, faults, noise=noise)
        without = {name.removeprefix("without "): one for name, one in fine.items() if name.startswith(WITHOUT_BLOCK)}
        if without:
            blocks = group_strengths(served, live, without, noise=noise)
    nothing = faults[IGNORED]
    off = {group: partial.get(without_group(group, names), nothing) for group, names in groups.items()}
    alone = {group: partial.get(alone_group(group), live) for group in groups}
    if len(groups) == 2:
        alone = dict(zip(off, reversed(off.values()), strict=True))
    total = float(sum(np.sum(one**2) for one in served))
    left = float(sum(np.sum(one**2) for one in _difference(served, faults[fits[0].name])))
    findings = Findings(
        strength=strength,
        fits=fits,
        visible=visible,
        groups=group_strengths(served, live, off, alone, noise=noise),
        unexplained=left / total if total else 0.0,
        predicted=rms(live),
        served=rms(served),
        noise=noise,
        base_distance=base_distance,
        partial=set(partial),
        fine=set(fine),
        siblings=set(others),
        modules=len(adapter),
        prompts=len(questions),
    )
    verdict, headline = decide(findings)
    return Proof(
        adapter=adapter_label,
        base=local.label,
        where=evidence.where,
        verdict=verdict,
        headline=headline,
        strength=strength,
        groups=findings.groups,
        blocks=blocks,
        faults=fits,
        unexplained=findings.unexplained,
        predicted=findings.predicted,
        served=findings.served,
        noise=evidence.noise,
        base_distance=base_distance,
        prompts=len(questions),
        requests=evidence.requests,
        notes=_notes(evidence, findings, verdict),
        points=np.stack([np.concatenate(one) for one in (live, faults[FITTED], served)], axis=1),
    )


def _without_prompts(
    evidence: Evidence, served: Changes, curve: Curve, ends: Sequence[int], noise: float
) -> tuple[Evidence, str] | None:
    """The evidence of next tokens alone, and the finding, if the tokens of prompts have another strength.

    ``ends`` is the number of tokens of each prompt, behind which its next tokens stand. vLLM computes
    log-probabilities of prompts without the update of lm_head.
    """
    if not sum(ends) or sum(ends) == sum(map(len, served)):
        return None
    of_prompts, of_next = (
        fit_strength(
            [one[part] for one, part in zip(served, parts, strict=True)],
            Curve(curve.strengths, [one[:, part] for one, part in zip(curve.changes, parts, strict=True)]),
            noise=noise,
        )
        for parts in ([slice(end) for end in ends], [slice(end, None) for end in ends])
    )
    if of_prompts.low <= of_next.high and of_next.low <= of_prompts.high:
        return None
    only_next = [one.copy() for one in evidence.served]
    for one, question in zip(only_next, evidence.questions, strict=True):
        one[: len(question.ids) - 1] = np.nan
    return replace(evidence, served=only_next), (
        f"The server is at {of_prompts.value:.2f} in the tokens of prompts, and at {of_next.value:.2f} in next tokens: "
        "its log-probabilities of prompts leave something out, as those of vLLM do with lm_head. Next tokens count."
    )


def _curve(by_strength: Mapping[str, Changes]) -> Curve:
    columns = zip(*by_strength.values(), strict=True)
    return Curve(np.array(STRENGTHS), [np.stack(one) for one in columns])


def _difference(changes: Changes, others: Changes) -> list[NDArray[np.float64]]:
    return [one - other for one, other in zip(changes, others, strict=True)]


def _notes(evidence: Evidence, findings: "Findings", verdict: Verdict) -> list[str]:
    """What the way in which the answers were got leaves open."""
    notes = []
    if evidence.base is None:
        notes.append(
            "The reference is the local base, so other rounding of the server's base counts as a change; with the "
            "server's own base (--base-name) it would not."
        )
    elif findings.noise > FAR * findings.predicted:
        notes.append(
            f"The bases differ by {number(findings.noise)} nats a token: if the server's is quantised, give its own "
            "file as --base."
        )
    if all(np.isnan(one[: len(q.ids) - 1]).all() for one, q in zip(evidence.served, evidence.questions, strict=True)):
        notes.append("Nothing is known of the tokens of prompts, so only next tokens were compared.")
    unseen = [name.removeprefix("without ") for name in sorted(findings.fine, key=natural_key)]
    unseen = [name for name in unseen if f"without {name}" not in findings.visible and not name.startswith("with ")]
    if verdict == "live" and unseen:
        notes.append(f"Too small to be missed here, each alone: {some(unseen, 6)}.")
    return notes


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What `decide` knows: the attributes of `Proof`, and the names of the faults by what they are."""

    strength: Interval
    fits: Sequence[FaultFit]
    visible: Set[str]
    groups: Sequence[GroupFit]
    unexplained: float
    predicted: float
    served: float
    noise: float
    base_distance: float | None
    partial: Set[str]  # faults of groups
    fine: Set[str]  # faults of blocks and kinds
    siblings: Set[str]
    modules: int
    prompts: int

    @property
    def foreign(self) -> bool:
        """Whether the answers are far from every prediction, and farther than noise explains."""
        return self.unexplained > RELATED and self.unexplained * self.served**2 > 3 * self.noise**2


def decide(seen: Findings) -> tuple[Verdict, str]:
    """The verdict, and the sentence for it.

    A verdict is given only where the other explanations are excluded.
    """
    possible = [fit.name for fit in seen.fits if fit.possible]
    interval = seen.strength
    shown = f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"
    half = max(interval.high - interval.low, 1e-9) / 2
    if IGNORED not in seen.visible or (LIVE in possible and (IGNORED in possible or half > WIDE)):
        # The half-width falls with the root of the number of prompts.
        enough = min(ceil(seen.prompts * (half / WIDE) ** 2), 10_000) if np.isfinite(half) else 32
        more = f"; --requests {2 * max(enough, seen.prompts + 1) + REPEATS} may do"
        return "cannot-tell", f"CANNOT TELL: {interval.value:.2f} ± {half:.2f} with {seen.prompts} prompts{more}."
    if LIVE in possible:
        told = _nearly_live(seen, possible, shown)
        if told:
            return told
    named = [name for name in possible if name not in (LIVE, FITTED, IGNORED)]
    if IGNORED in possible and seen.served < RELATED * seen.predicted + 3 * seen.noise:
        return "ignored", "IGNORED: the answers are those of the base."
    if named and named[0] in seen.siblings:
        return "other-adapter", f"ANOTHER ADAPTER: the answers are those of {named[0]}."
    if seen.foreign:
        return _foreign(seen, shown)
    if named and named[0] in seen.partial | seen.fine:
        return "partly", f"PARTLY: {_group_text(seen.groups)}: as if {', or '.join(named[:3])}."
    if not named and interval.contains(1):
        left = f"{seen.unexplained:.1%} of the change stays unexplained"
        return "cannot-tell", f"CANNOT TELL: neither full strength nor a known fault fits; {shown}, and {left}."
    how = f": {', or '.join(name.split(': ', 1)[-1] for name in named[:3])}" if named else ""
    return "other-strength", f"LIVE at {shown}{how}."


def _nearly_live(seen: Findings, possible: Sequence[str], shown: str) -> tuple[Verdict, str] | None:
    """The verdict where the adapter as it is explains the answers; None if the strength is another one."""
    rivals = [name for name in possible if name in seen.visible and name != FITTED]
    if rivals:
        return "cannot-tell", f"CANNOT TELL: live at {shown}, or {', or '.join(rivals[:3])}."
    if seen.foreign:
        return _foreign(seen, shown)
    if any(map(_differs, seen.groups)):
        return "partly", f"PARTLY: {_group_text(seen.groups)}."
    unseen = sorted(name for name in seen.partial if name.startswith("without ") and name not in seen.visible)
    if unseen:
        what = ", ".join(name.removeprefix("without ") for name in unseen)
        return "cannot-tell", f"CANNOT TELL for {what}: too small to be seen; the rest is live at {shown}."
    if not seen.strength.contains(1):
        return None
    where = "all" if seen.fine <= seen.visible else "all groups of its"
    return "live", f"LIVE at {shown}, in {where} {seen.modules} modules."


def _foreign(seen: Findings, shown: str) -> tuple[Verdict, str]:
    """The sentence where no prediction explains the answers."""
    if seen.base_distance is None:
        what = "the answers differ from all predictions, perhaps because the server's base is not --base"
        return "cannot-tell", f"CANNOT TELL: {what}; give --base-name, or the server's own file as --base."
    if seen.unexplained > 0.5:
        return "other-adapter", "ANOTHER ADAPTER: it changes the answers, but not in the direction of this one."
    share = f"{1 - seen.unexplained:.0%} of its change is explained"
    return "other-adapter", f"ANOTHER ADAPTER, or another state of this one: {share}, at {shown}."


def _differs(group: GroupFit) -> bool:
    """Whether the strength of a group is clearly not 1: by more than a tenth, and beyond twice its interval."""
    strength = group.strength
    low, high = 2 * strength.low - strength.value, 2 * strength.high - strength.value
    return abs(strength.value - 1) > 0.1 and not low <= 1 <= high


def _group_text(groups: Sequence[GroupFit]) -> str:
    return ", ".join(f"{' + '.join(group.groups)} {group.strength.value:.2f}" for group in groups)
