"""The verb ``prove``: is an adapter live where it is served, at its strength, in all of its modules?"""

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
from loralens.core.messages import progress
from loralens.core.names import natural_key, some
from loralens.errors import LoraLensError, OptionError, visible
from loralens.exports import takes_options
from loralens.formats.files.atomic import check_write_target
from loralens.formats.files.location import existing_path
from loralens.serving.interfaces import connect
from loralens.tables.numbers import fixed, number
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Keys, Table, rows_key
from loralens.verbs.models.models import ModelSource, restore_settings
from loralens.verbs.models.texts import TextSource, read_texts
from loralens.verbs.served.evidence import (
    REPEATS,
    REQUESTS,
    Evidence,
    ask_server,
    base_name_of,
    choose,
    read_recorded,
    run_other,
    write_questions,
)
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
    scale_faults,
    vary,
    without_group,
)
from loralens.verbs.served.served import NamesCompared, compare_names
from loralens.verbs.shared.adapters import AdapterSource, labels, read_adapter
from loralens.verbs.shared.options import Reading, check_counts

Verdict = Literal["live", "ignored", "other-strength", "partly", "other-adapter", "cannot-tell"]
IGNORED, FITTED = "ignored", "at the fitted strength"  # names of predictions, as `LIVE` is one
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


@takes_options
def prove(
    adapter: AdapterSource | None = None,
    *,
    base: ModelSource | None = None,
    server: str | None = None,
    model: str | None = None,
    between: tuple[str, str] | None = None,
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
) -> Proof | NamesCompared | None:
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
    between : tuple of str, optional
        Without ADAPTER and --base: two names of the server. This tells only whether they answer differently.
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
        Replace what is already at the path of ``write_prompts``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Returns
    -------
    Proof or NamesCompared
        The latter with ``between``; None with ``write_prompts``.

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
    if between is not None:
        if adapter is not None or base is not None or server is None or len(between) != 2:
            raise OptionError(
                "--between compares two names of a server, and nothing else",
                fix="give --between NAME1 NAME2 --server URL, without ADAPTER and --base",
            )
        return compare_names(server, (between[0], between[1]), interface=interface, timeout=timeout)
    if adapter is None or base is None:
        missing = "ADAPTER" if adapter is None else "--base"
        raise OptionError(f"{missing} is missing", fix="give ADAPTER and --base MODEL")
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
    _check_paths(against, target, overwrite=overwrite)
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
            evidence = read_recorded(len(local.loaded.tokenizer), Path(outputs))
        else:
            texts = bank() if data is None else [text.text for text in read_texts(data)]
            if served is not None and base_name is None:
                base_name = base_name_of(served, str(model))
            asks_base = served is None or base_name is not None
            questions = choose(local, read, texts, served, requests, asks_base=asks_base)
            if target:
                write_questions(questions, target)
                return None
            if served is not None:
                evidence = ask_server(served, str(model), base_name, questions)
            else:
                assert against is not None
                evidence = run_other(local, against, questions, device=device, dtype=dtype, threads=threads)
        known = dict(zip(names[1:], others, strict=True)) | (_of_fleet(fleet, local, read) if fleet else {})
        return judge(local, read, evidence, siblings=known, adapter_label=names[0])


def _check_paths(against: ModelSource | None, target: Path | None, *, overwrite: bool) -> None:
    """What can be refused before the base is loaded, which may take minutes."""
    if target:
        check_write_target(target, [], folder=False, overwrite=overwrite)
    if against is not None and not isinstance(against, tuple):
        existing_path(Path(against))


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


class Predictor:
    """The served changes, and what the local model predicts for them, at the tokens for which the server answered.

    Attributes
    ----------
    served : sequence of ndarray of float64
        For each prompt the changes of its tokens, shape (tokens,).
    ends : sequence of int
        How many of these are tokens of the prompt; next tokens follow.
    base_distance : float or None
        See `Proof`.
    """

    def __init__(self, local: LocalModel, evidence: Evidence) -> None:
        self._local, self._questions = local, evidence.questions
        self._plain = local.answers(evidence.questions, None)
        reference = self._plain if evidence.base is None else evidence.base
        served = [a - b for a, b in zip(evidence.served, reference, strict=True)]
        self._seen = [np.isfinite(one) for one in served]
        self.served = self._where_seen(served)
        self.ends = [int(seen[: len(q.ids) - 1].sum()) for seen, q in zip(self._seen, self._questions, strict=True)]
        apart = None if evidence.base is None else difference(evidence.base, self._plain)
        self.base_distance = None if apart is None else rms(self._where_seen(apart))

    def change(self, variant: Adapter | None) -> Changes:
        """The predicted changes with a variant of the adapter; None is the base."""
        if variant is None or (not len(variant) and not variant.extra):
            return [0 * one for one in self.served]
        return self._where_seen(difference(self._local.answers(self._questions, variant), self._plain))

    def changes(self, variants: Mapping[str, Adapter | None], what: str) -> dict[str, Changes]:
        """The same for several, with a progress bar that is called ``what``."""
        found: dict[str, Changes] = {}
        with progress(what, len(variants)) as step:
            for name, variant in variants.items():
                found[name] = self.change(variant)
                if step:
                    step(1)
        return found

    def _where_seen(self, changes: Changes) -> list[NDArray[np.float64]]:
        return [one[seen] for one, seen in zip(changes, self._seen, strict=True)]


def difference(changes: Changes, others: Changes) -> list[NDArray[np.float64]]:
    """The differences of two lists of arrays."""
    return [one - other for one, other in zip(changes, others, strict=True)]


def _fit(predictor: Predictor, adapter: Adapter, evidence: Evidence) -> tuple[Curve, Interval, float]:
    """The curve over strengths, the strength that fits best, and the noise of a served change in nats."""
    served = predictor.served
    # A served change has the noise of two answers. Where the bases compute differently, by 16 bits or by other codes,
    # repeating a question does not show it, and the distance of the bases does.
    noise = max((evidence.noise or 0.0) * sqrt(2), predictor.base_distance or 0.0)
    variants = {f"{strength:g}": vary(adapter, strength) for strength in STRENGTHS}
    columns = zip(*predictor.changes(variants, "predicting strengths").values(), strict=True)
    curve = Curve(np.array(STRENGTHS), [np.stack(one) for one in columns])
    strength = fit_strength(served, curve, noise=noise)
    while strength.value == curve.strengths[-1] < MOST:
        farther = 1.5 * float(curve.strengths[-1])
        curve = curve.extended(farther, predictor.change(vary(adapter, farther)))
        strength = fit_strength(served, curve, noise=noise)
    if evidence.base is None:
        # Nothing else shows how differently the server computes.
        noise = max(noise, rms(difference(served, curve.at(strength.value))))
        strength = fit_strength(served, curve, noise=noise)
    return curve, strength, noise


def judge(
    local: LocalModel,
    adapter: Adapter,
    evidence: Evidence,
    *,
    siblings: Mapping[str, Adapter],
    adapter_label: str,
) -> Proof:
    """Compare the served changes with the predicted ones, and say what they mean."""
    predictor = Predictor(local, evidence)
    served, changes = predictor.served, predictor.changes
    curve, strength, noise = _fit(predictor, adapter, evidence)
    told = _without_prompts(evidence, predictor, curve, noise)
    if told:
        remaining, finding = told
        proof = judge(local, adapter, remaining, siblings=siblings, adapter_label=adapter_label)
        return replace(proof, notes=[finding, *proof.notes])
    live = curve.at(1.0)
    partial = changes(group_faults(adapter), "predicting groups of modules")
    others = changes({f"the adapter {name}": one for name, one in siblings.items()}, "predicting other adapters")
    faults: dict[str, Changes] = {LIVE: live, IGNORED: [0 * one for one in live], FITTED: curve.at(strength.value)}
    scales = changes(scale_faults(adapter), "predicting faults of the scale")
    faults |= {**scales, **partial, **others}
    fits, visible = compare_faults(served, faults, noise=noise)
    fine: dict[str, Changes] = {}
    blocks: list[GroupFit] = []
    # These take a forward pass for each block, so only where a coarser prediction does not explain the answers already.
    named = any(fit.possible and fit.name in visible and fit.name not in (FITTED, *partial) for fit in fits)
    if IGNORED in visible and not named:
        fine = changes(fine_faults(adapter), "predicting blocks and kinds of modules")
        faults |= fine
        fits, visible = compare_faults(served, faults, noise=noise)
        without = {name.removeprefix("without "): one for name, one in fine.items() if name.startswith(WITHOUT_BLOCK)}
        if without:
            blocks = group_strengths(served, live, without, noise=noise)
    nearest = next(fit.name for fit in fits if fit.name not in (LIVE, IGNORED))
    rescaled = nearest == FITTED or nearest in scales
    total = float(sum(np.sum(one**2) for one in served))
    left = float(sum(np.sum(one**2) for one in difference(served, faults[fits[0].name])))
    findings = Findings(
        strength=strength,
        fits=fits,
        visible=visible,
        groups=_groups(predictor, adapter, curve, strength.value if rescaled else 1.0, partial, noise),
        unexplained=left / total if total else 0.0,
        predicted=rms(live),
        served=rms(served),
        noise=noise,
        base_distance=predictor.base_distance,
        partial=set(partial),
        fine=set(fine),
        siblings=set(others),
        modules=len(adapter),
        prompts=len(evidence.questions),
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
        base_distance=predictor.base_distance,
        prompts=len(evidence.questions),
        requests=evidence.requests,
        notes=_notes(evidence, findings, verdict),
        points=np.stack([np.concatenate(one) for one in (live, faults[FITTED], served)], axis=1),
    )


def _groups(
    predictor: Predictor, adapter: Adapter, curve: Curve, strength: float, partial: Mapping[str, Changes], noise: float
) -> list[GroupFit]:
    """The strength of every group of modules, from predictions around a strength of the whole adapter.

    ``partial`` has the predictions for strength 1. The answers of groups are not linear in the strength.
    """
    groups, live = groups_of(adapter), curve.at(strength)
    if abs(strength - 1) > 0.1 and strength > 0:
        partial = predictor.changes(group_faults(vary(adapter, strength)), "predicting groups at this strength")
    else:
        strength, live = 1.0, curve.at(1.0)
    nothing = curve.at(0.0)
    without = {group: partial.get(without_group(group, names), nothing) for group, names in groups.items()}
    alone = {group: partial.get(alone_group(group), live) for group in groups}
    if len(groups) == 2:
        alone = dict(zip(without, reversed(without.values()), strict=True))
    return [
        GroupFit(fit.groups, fit.strength.times(strength))
        for fit in group_strengths(predictor.served, live, without, alone, noise=noise)
    ]


def _without_prompts(
    evidence: Evidence, predictor: Predictor, curve: Curve, noise: float
) -> tuple[Evidence, str] | None:
    """The evidence of next tokens alone, and the finding, if the tokens of prompts have another strength.

    vLLM computes log-probabilities of prompts without the update of lm_head.
    """
    served, ends = predictor.served, predictor.ends
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
    left = findings.visible - {fit.name for fit in findings.fits if fit.possible}  # faults that are excluded
    unseen = [name for name in unseen if f"without {name}" not in left and not name.startswith("with ")]
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
        own = ", or the server's own file as --base," if seen.noise > FAR * seen.predicted else ""
        more = f"; --requests {2 * max(enough, seen.prompts + 1) + REPEATS}{own} may do"
        return "cannot-tell", f"CANNOT TELL: {interval.value:.2f} ± {half:.2f} with {seen.prompts} prompts{more}."
    if LIVE in possible:
        told = _nearly_live(seen, possible, shown)
        if told:
            return told
    named = [name for name in possible if name not in (LIVE, FITTED, IGNORED)]
    if IGNORED in possible and seen.served < RELATED * seen.predicted + 3 * seen.noise:
        if interval.contains(0):
            return "ignored", "IGNORED: the answers are those of the base."
        return "cannot-tell", f"CANNOT TELL: {shown}; it may be {', or '.join(['ignored', *named[:2]])}."
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
    # Predictions come nearest first. A block or a kind only counts if it is nearer than the whole adapter, since the
    # groups are what is answered for; the notes name those that are not excluded.
    later = set(possible[possible.index(LIVE) :]) & seen.fine
    rivals = [name for name in possible if name in seen.visible - later - {LIVE, FITTED}]
    if rivals:
        return "cannot-tell", f"CANNOT TELL: {shown}; it may be live, or {', or '.join(rivals[:3])}."
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
    where = "all" if seen.fine <= seen.visible - set(possible) else "all groups of its"
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
