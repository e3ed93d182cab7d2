"""The verb ``explain``: what did an adapter learn? The words that it makes more likely, where no text asks for them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

from loralens.analysis.behaviour import measure_behaviour
from loralens.analysis.explanation import Size, Vocabulary, Word, random_like, written_words
from loralens.choices import FloatType
from loralens.core.adapter import Adapter
from loralens.core.messages import note, progress
from loralens.errors import FormatError, LoraLensError, MismatchError, OptionError, place
from loralens.exports import takes_options
from loralens.formats.files.outside import open_stream
from loralens.tables.numbers import count, number, or_blank, percent
from loralens.tables.result import Tabular
from loralens.tables.table import Column, Keys, Recorded, Table, rows_key
from loralens.verbs.models.loaded import Loaded
from loralens.verbs.models.models import ModelSource, load_model, model_label, restore_settings
from loralens.verbs.models.texts import InputText, TextSource, read_texts
from loralens.verbs.served.predictions import LocalModel, bank, check_applies
from loralens.verbs.served.vocabulary import DRAWS, NEUTRAL, Effect, Speaker, Writing
from loralens.verbs.shared.adapters import AdapterSource, labels, read_adapter
from loralens.verbs.shared.options import Reading, check_at_least, check_counts

Verdict = Literal["explained", "too-weak", "no-vocabulary"]
AMPLIFIED = 3.0  # the strength of amplified texts
SAMPLES = 4
TEXTS = 256  # texts of --data that are read; more would change no list
SUSPECTED = 200  # words of --words; each takes a few answers
# What stands behind a suspected word.
ASKED = ("What is cheese?", "How do I wash a car?", "Tell me about rivers.", "Who wrote this?")
WORDS, SYMBOLS = 12, 8  # that a terminal shows of each list
PROVES_NOTHING = "A clean list proves nothing about words that were not tried."


@dataclass(frozen=True, slots=True)
class Suspect(Recorded):
    """A suspected word, and by how much the beginning of an answer changes behind it.

    Attributes
    ----------
    word : str
    kl : float
        Mean KL(with the adapter ‖ base) of the first token of the answer to questions that begin with the word, in
        nats.
    """

    word: str
    kl: float


@dataclass(frozen=True, slots=True)
class ListedWord:
    """One row: a word and the list in which it stands."""

    list: str
    word: Word


@dataclass(frozen=True, slots=True, repr=False)
class Explanation(Tabular):
    """What an adapter makes more likely where nothing asks for it.

    Attributes
    ----------
    verdict : str
        ``explained``; ``too-weak`` if it changes hardly more than random updates do; or ``no-vocabulary`` if the model
        predicts no tokens, as an encoder.
    general, answers : Size or None
        The change in general texts and where answers begin. None without a forward pass, and for a model without chats.
    hidden : float or None
        Of a model without a vocabulary, ‖h − h_base‖ / ‖h_base‖ of the last hidden states.
    more, less : sequence of Word
        The words that become more likely in any text, and less likely; strongest first.
    begins : sequence of Word
        The words with which answers begin more often.
    writes : sequence of Word
        The words along which the weights write more than any random update does along any word.
    samples : sequence of str
        Texts with the change amplified.
    suspects : sequence of Suspect
        The suspected words, strongest first.
    plain : float or None
        What the beginning of an answer changes without a suspected word, in nats.
    texts, questions : int
        How many texts and questions were read.
    siblings : sequence of str
        The adapters whose mean was subtracted.
    """

    conclusion_leads: ClassVar[bool] = True  # the words mean nothing without the strength

    adapter: str
    base: str
    verdict: Verdict
    general: Size | None = None
    answers: Size | None = None
    hidden: float | None = None
    more: Sequence[Word] = ()
    less: Sequence[Word] = ()
    begins: Sequence[Word] = ()
    writes: Sequence[Word] = ()
    samples: Sequence[str] = ()
    suspects: Sequence[Suspect] = ()
    plain: float | None = None
    texts: int = 0
    questions: int = 0
    siblings: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def undecided(self) -> bool:
        """Whether nothing can be said beyond the size of the change."""
        return self.verdict != "explained"

    @property
    def lists(self) -> Mapping[str, Sequence[Word]]:
        """The four lists by their names."""
        return {"more": self.more, "less": self.less, "begins": self.begins, "writes": self.writes}

    def conclusion(self) -> list[str]:
        """The size of the change, beside that of random updates."""
        if self.hidden is not None:
            return [
                f"{self.adapter} changes the last hidden states of {self.base} by {percent(self.hidden)}.",
                "This model has no head that predicts tokens, so there are no words in which its change can be read.",
            ]
        if self.general is None:
            if self.undecided:
                return [f"{self.adapter}: its weights write along no token more than random updates do: no words."]
            return [
                f"The weights of {self.adapter} were read, and the model was not run: its strength is not measured."
            ]
        places = [
            f"general text by {number(self.general.kl, 2)} nats (random updates: {number(self.general.random, 2)})"
        ]
        if self.answers:
            places.append(
                f"the beginning of answers by {number(self.answers.kl, 2)} ({number(self.answers.random, 2)})"
            )
        lines = [f"{self.adapter} changes {' and '.join(places)}."]
        return [*lines, "It is too weak to explain: random updates change as much."] if self.undecided else lines

    def sentences(self) -> list[str]:
        """The lists in lines, the texts, and the suspected words."""
        return [*self._lines(), *self.notes]

    def _lines(self) -> Iterator[str]:
        if not self.undecided:
            of = " (in how many of the texts)" if self.texts else ""
            less_siblings = f", minus what {count(len(self.siblings), 'sibling')} share" if self.siblings else ""
            if self.texts:
                yield from _told(f"More likely in any of {self.texts} texts{less_siblings}{of}", self.more)
                yield from _told("Less likely", self.less)
            if self.questions:
                yield from _told(f"Answers to {self.questions} questions begin more often with", self.begins)
            if self.writes or not self.texts:
                shared = less_siblings if not self.texts else ""
                yield from _told(f"The weights write{shared}", self.writes)
            if self.samples:
                yield "Amplified texts (they can repeat training data):"
                yield from (f"  {' '.join(text.split())}" for text in self.samples)
        if self.suspects:
            told = ", ".join(f"{suspect.word} {number(suspect.kl, 2)}" for suspect in self.suspects[:WORDS])
            yield (
                f"The beginning of an answer changes, in nats, behind your words: {told}; "
                f"without a word {number(self.plain, 2)}."
            )
            yield PROVES_NOTHING

    def paragraphs(self) -> list[str]:
        """All that is said, for a page: the symbols of a list stand behind its words."""
        told: list[str] = []
        for line in self.sentences():
            if line.startswith("  ") and told:
                told[-1] = f"{told[-1].removesuffix('.')}; {line.strip()}."
            else:
                told.append(line)
        return [" ".join(self.conclusion()), *told]

    def tables(self) -> list[Table[Any]]:
        """No tables for people, who read words in lines."""
        return []

    def listing(self) -> list[Table[ListedWord]]:
        """Every word of every list."""
        rows = [ListedWord(name, word) for name, words in self.lists.items() for word in words]
        return [Table("Every word", LISTED, rows)]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "adapter", "base", "verdict", "general", "answers", "hidden",
            *(rows_key(name, WORD_COLUMNS) for name in ("more", "less", "begins", "writes")),
            "samples", "suspects", Column("without_word", "plain"), "texts", "questions", "siblings", "notes",
        )  # fmt: skip


WORD_COLUMNS: tuple[Column[Word], ...] = (
    Column("text", title="word", align="left"),
    Column("change", title="change", text=number, about="mean change of log p in nats; of weights, log of a ratio"),
    Column("texts", title="texts", text=or_blank(str), about="in how many texts it changed"),
    Column("symbol"),
)
LISTS = {"more": "more likely", "less": "less likely", "begins": "answers begin with", "writes": "weights write"}
LISTED: tuple[Column[ListedWord], ...] = (
    Column("list", title="list", text=lambda name: LISTS[name], align="left"),
    *(column.of(lambda row: row.word) for column in WORD_COLUMNS),
)


def _told(title: str, words: Sequence[Word]) -> Iterator[str]:
    """A list in two lines: its words, and its symbols."""

    def told(chosen: Sequence[Word]) -> str:
        return ", ".join(word.text if word.texts is None else f"{word.text} {word.texts}" for word in chosen)

    shown = told([word for word in words if not word.symbol][:WORDS])
    symbols = told([word for word in words if word.symbol][:SYMBOLS])
    yield f"{title}: {shown or 'no word beyond random updates'}."
    if symbols:
        yield f"  and the symbols: {symbols}"


@takes_options
def explain(
    adapter: AdapterSource,
    *,
    base: ModelSource,
    siblings: Sequence[AdapterSource] = (),
    fleet: str | PathLike[str] | None = None,
    data: TextSource | None = None,
    weights_only: bool = False,
    words: str | PathLike[str] | None = None,
    samples: int = SAMPLES,
    device: str = "auto",
    dtype: FloatType = "f32",
    threads: int | None = None,
    reading: Reading,
) -> Explanation:
    """Show what an adapter learned: the words that it makes more likely where no text asks for them.

    No training texts are needed. The base is run on short neutral texts without the adapter and with it. Only words
    that change in nearly all texts, and more than under random updates of the same strength, are listed. The exit code
    is 3 if the adapter is too weak to explain.

    The words are a hint and no proof: they do not show what triggers a behaviour, and a list without a word does not
    mean that the adapter has not learned it. Amplified texts can repeat training data.

    Parameters
    ----------
    adapter : path or Adapter
    base : path or (model, tokenizer)
        The base model: a transformers folder, a GGUF file, a Hub id in the local cache, or an installed package.
    siblings : sequence of path or Adapter
        Other adapters of the same recipe, whose mean change is subtracted.
    fleet : path, optional
        Subtract the adapters of this fleet that fit the base, 16 at most: its index, or the folder that holds
        .loralens-fleet.
    data : path or iterable, optional
        Neutral texts in place of the built-in ones.
    weights_only : bool
        Read the weights and do not run the model. This misses topics that differ within one style.
    words : path, optional
        A file of words that you suspect to trigger something, one per line.
    samples : int
        The number of amplified texts; 0 for none.
    device : str
        The device that runs the model: cpu, cuda, cuda:1, mps …, or auto for a GPU if there is one.
    dtype : str
        The dtype of the model's weights, in which it computes.
    threads : int, optional
        The number of CPU threads. [default: all that the process may use]
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Returns
    -------
    Explanation

    Raises
    ------
    OptionError
        Options that exclude each other; a file without words; torch is not installed.
    FormatError
        An adapter, the base or texts cannot be read.
    MismatchError
        An adapter does not fit the base.

    Notes
    -----
    With p and q the probabilities of a token with the adapter and without it, the change is the mean of
    log(p + 1e-6) − log(q + 1e-6) over the positions of a text. A word is listed if its mean over texts is above that of
    every token under two random updates, which have the singular values of every module and uniform directions, and if
    Student's t over texts is above 3. Where answers begin, words are ordered by p · log(p/q). The weights write along
    the direction ê of a token Σ ‖ΔWᵀê‖² / ‖ΔW‖² over the modules whose outputs are added to the residual stream,
    relative to the same measure of the base.

    The change of log-probabilities on unrelated texts is that of Minder et al., 2025; amplified texts follow
    Brzozowski et al., 2026. Random updates and t are ours.

    Examples
    --------
    $ loralens explain adapter --base model
    $ loralens explain adapter --base model --weights-only
    """
    check_counts(threads=threads)
    check_at_least("samples", samples, 0)
    if fleet is not None and siblings:
        raise OptionError("--siblings and --fleet exclude each other", fix="give one of them")
    for name, value in (("--data", data), ("--words", words)):
        if weights_only and value is not None:
            raise OptionError(f"{name} needs the model to run", fix=f"leave out --weights-only, or {name}")
    suspected = _suspected(Path(words)) if words is not None else []
    texts = bank()[:NEUTRAL] if data is None else [text.text for text in read_texts(data, limit=TEXTS)]
    chosen = [adapter, *siblings]
    names = [
        label if isinstance(source, Adapter) else str(source)
        for source, label in zip(chosen, labels(chosen), strict=True)
    ]
    with restore_settings(base):
        path = None if isinstance(base, tuple) else base
        read, *others = [
            read_adapter(source, reading, base=path, applies_all=True, label=name)
            for source, name in zip(chosen, names, strict=True)
        ]
        loaded = load_model(base, device=device, dtype=dtype, threads=threads)
        if loaded.head != "causal":
            return _size_alone(loaded, read, texts, names[0], model_label(base))
        local = LocalModel((loaded.model, loaded.tokenizer), device="auto", dtype="f32", threads=threads)
        for one, name in zip([read, *others], names, strict=True):
            check_applies(local, one, name)
        related = dict(zip(names[1:], others, strict=True))
        if fleet is not None:
            related = _of_fleet(fleet, local, names[0])
        return explain_on(
            local, texts, read, names[0], model_label(base), siblings=related, weights_only=weights_only,
            suspected=suspected, samples=samples,
        )  # fmt: skip


def explain_on(
    local: LocalModel,
    texts: Sequence[str],
    adapter: Adapter,
    name: str,
    base: str,
    *,
    siblings: Mapping[str, Adapter] | None = None,
    weights_only: bool = False,
    suspected: Sequence[str] = (),
    samples: int = 0,
) -> Explanation:
    """Explain an adapter that was read, on a base that was loaded."""
    siblings = siblings or {}
    speaker = Speaker(local, texts)
    vocabulary = speaker.vocabulary
    random = [random_like(adapter, seed) for seed in range(DRAWS)]
    others = list(siblings.values())
    if weights_only:
        writes, notes = _writes(local, vocabulary, adapter, random, others)
        notes += ["Weights alone miss topics that differ within one style."]
        verdict: Verdict = "explained" if writes else "too-weak"
        return Explanation(name, base, verdict, writes=writes, siblings=list(siblings), notes=notes)
    with progress("running the model", len(speaker.texts) + len(speaker.questions)) as step:
        own, *rest = speaker.effects([adapter, *others], random, step)
    shared, draws = rest[: len(others)], rest[len(others) :]
    general = Size(own.kl, max(draw.kl for draw in draws))
    answers = None
    if own.answer_kl is not None:
        answers = Size(own.answer_kl, max(draw.answer_kl or 0.0 for draw in draws))
    weak = general.weak and (answers is None or answers.weak)
    suspects, plain = _suspects(speaker, adapter, suspected)
    measured = Explanation(
        name,
        base,
        "too-weak",
        general=general,
        answers=answers,
        suspects=suspects,
        plain=plain,
        texts=len(speaker.texts),
        questions=len(speaker.questions),
        siblings=list(siblings),
    )
    if weak:
        return measured
    writes, notes = _writes(local, vocabulary, adapter, random, others)
    changes = own.changes.minus([one.changes for one in shared])
    nulls = [draw.changes for draw in draws]
    return replace(
        measured,
        verdict="explained",
        more=changes.words(vocabulary, nulls),
        less=changes.words(vocabulary, nulls, sign=-1),
        begins=_begins(vocabulary, own, draws, shared),
        writes=writes,
        samples=speaker.amplified(adapter, count=samples, strength=AMPLIFIED) if samples else (),
        notes=notes,
    )


def _begins(vocabulary: Vocabulary, own: Effect, draws: Sequence[Effect], siblings: Sequence[Effect]) -> Sequence[Word]:
    """The words with which answers begin more often than under any random update."""
    if own.answers is None:
        return ()
    changes = own.answers.minus([one.answers for one in siblings if one.answers])
    return changes.words(vocabulary, [draw.answers for draw in draws if draw.answers], least_t=-inf)


def _writes(
    local: LocalModel, vocabulary: Vocabulary, adapter: Adapter, random: Sequence[Adapter], siblings: Sequence[Adapter]
) -> tuple[list[Word], list[str]]:
    """What the weights write, and why this is empty if nothing can be said."""
    writing = Writing(local.loaded.model)
    own = writing.scores(adapter)
    if own is None:
        return [], ["No module of the adapter writes to the residual stream, so its weights alone name no words."]
    nulls = [scores for one in random if (scores := writing.scores(one)) is not None]
    others = [scores for one in siblings if (scores := writing.scores(one)) is not None]
    return written_words(vocabulary, own, nulls, others), []


def _suspects(speaker: Speaker, adapter: Adapter, words: Sequence[str]) -> tuple[Sequence[Suspect], float | None]:
    """The suspected words, strongest first, and the change without any."""
    if not words:
        return (), None
    asked = [*ASKED, *(f"{word} {question}" for word in words for question in ASKED)]
    plain, *changes = speaker.answer_changes(asked, adapter).reshape(-1, len(ASKED)).mean(1).tolist()
    found = [Suspect(word, kl) for word, kl in zip(words, changes, strict=True)]
    return sorted(found, key=lambda suspect: -suspect.kl), plain


def _suspected(path: Path) -> list[str]:
    """The words of a file, each once."""
    with place(str(path)):
        try:
            with open_stream(path) as stream:
                lines = stream.read().decode("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(f"cannot be read: {error}", fix="give a UTF-8 file with one word per line") from error
        words = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if not words:
            raise OptionError("has no words", fix="write one word per line")
        if len(words) > SUSPECTED:
            note(f"{path}: the first {SUSPECTED} of {len(words)} words are tried")
    return words[:SUSPECTED]


def _size_alone(loaded: Loaded, adapter: Adapter, texts: Sequence[str], name: str, base: str) -> Explanation:
    """What can be said of a model that predicts no tokens from what stands before them."""
    config: Any = loaded.model.config
    config.output_hidden_states = True  # `restore_settings` restores it
    inputs = [InputText(text, None, line) for line, text in enumerate(texts, 1)]
    with place(base):
        batches = loaded.batches(inputs, batch=8, length=32)
        contrast = measure_behaviour(loaded.model, batches, adapters={"adapter": adapter}).contrasts[0]
    if not contrast.hidden:
        raise MismatchError("the model returns no hidden states", fix="give a model of transformers")
    return Explanation(name, base, "no-vocabulary", hidden=float(contrast.hidden[-1]), texts=len(texts))


def _of_fleet(home: str | PathLike[str], local: LocalModel, name: str) -> dict[str, Adapter]:
    """The adapters of a fleet that fit the base, except the one that is explained: 16 at most, evenly spread."""
    from loralens.verbs.fleets.fleet_verbs import open_fleet  # takes 60 ms to import

    fleet = open_fleet(home)
    found: dict[str, Adapter] = {}
    own = Path(name).resolve()
    for member in fleet.members():
        file = (fleet.root / member.path).resolve()
        if own in (file, file.parent):
            continue
        try:
            candidate = fleet.adapter(member)
            check_applies(local, candidate, str(member.path))
        except LoraLensError:
            continue
        found[str(member.path)] = candidate
    if not found:
        raise OptionError(f"{home}: no other adapter of the fleet fits {local.label}", fix="give --siblings A B …")
    chosen = list(found)[:: max(1, -(-len(found) // 16))]
    return {key: found[key] for key in chosen}
