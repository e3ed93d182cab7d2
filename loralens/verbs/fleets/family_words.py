"""The words that set the families of a fleet apart from each other, on a base that can be run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from statistics import fmean
from typing import Any, NamedTuple, final

import numpy as np

from loralens.analysis.explanation import Size, Vector, Word, random_like, written_words
from loralens.choices import FloatType
from loralens.core.adapter import Adapter
from loralens.core.messages import progress
from loralens.core.threads import Step
from loralens.errors import LoraLensError
from loralens.fleet.catalogue import Member
from loralens.fleet.fleet_index import FleetIndex
from loralens.fleet.groups import Family
from loralens.tables.numbers import count
from loralens.tables.result import ResultSequence
from loralens.tables.table import Column, Columns, Keys, Table, label_column, rows_key
from loralens.verbs.models.models import ModelSource, model_label, restore_settings
from loralens.verbs.served.predictions import LocalModel, bank, check_applies
from loralens.verbs.served.vocabulary import DRAWS, NEUTRAL, Speaker, Writing

READ = 3  # members of a family that are read, those nearest to its middle
SHOWN = 10  # words of a family that a terminal shows


@final
@dataclass(frozen=True, slots=True)
class FamilyWords:
    """A family of a fleet, and the words that set it apart from the other families.

    Attributes
    ----------
    number : int
        That of `loralens.Fleet.families`; 0 for an adapter that is in no family.
    members : sequence of Member
        Those nearest to the middle first.
    read : int
        How many of them were read.
    words : sequence of Word
        Strongest first; empty if random updates do as much.
    """

    number: int
    members: Sequence[Member]
    read: int
    words: Sequence[Word]


class FamilyWord(NamedTuple):
    """One row: a word of a family."""

    family: FamilyWords
    word: Word


@final
@dataclass(frozen=True, slots=True, repr=False)
class FamilyWordsResult(ResultSequence[FamilyWords]):
    """The families of a fleet by the words that set them apart, the largest first; the result is a sequence of them.

    Attributes
    ----------
    base : str
    families : sequence of FamilyWords
        The families that fit the base, and the adapters that are in none, each for itself.
    unfit : int
        How many families and single adapters do not fit the base, or cannot be read.
    further : int
        How many others were not read, as ``limit`` of them were.
    forward : bool
        Whether the model was run.
    """

    contents = "families"

    base: str
    families: Sequence[FamilyWords]
    unfit: int
    further: int
    forward: bool

    @property
    def undecided(self) -> bool:
        """Whether no family has a word."""
        return not any(family.words for family in self.families)

    def conclusion(self) -> list[str]:
        """How many families fit the base, how many have words, and what was left out."""
        left = f"; {self.unfit} do not fit" if self.unfit else ""
        left += f"; {self.further} were not read (--limit)" if self.further else ""
        if not self.families:
            return [f"No family or single adapter of the fleet fits {self.base}{left}."]
        grouped = sum(family.number > 0 for family in self.families)
        kinds = ((grouped, "family", "families"), (len(self.families) - grouped, "single adapter", "single adapters"))
        fit = " and ".join(count(number, *nouns) for number, *nouns in kinds if number)
        verb = "fits" if len(self.families) == 1 else "fit"
        spoken = sum(bool(family.words) for family in self.families)
        return [f"{fit} {verb} {self.base}{left}. {spoken} of {len(self.families)} have words of their own."]

    def sentences(self) -> list[str]:
        """The words of every family, and how they were found."""
        lines = list(map(_told, self.families))
        if not self.forward and self.families:
            lines.append("The weights alone were read, which misses topics that differ within one style (--forward).")
        if len(self.families) == 1:
            lines.append("There is no other family, so nothing was subtracted.")
        return lines

    def tables(self) -> list[Table[Any]]:
        """No tables for people, who read words in lines."""
        return []

    def listing(self) -> list[Table[FamilyWord]]:
        """Every word of every family."""
        rows = [FamilyWord(family, word) for family in self.families for word in family.words]
        return [Table("words", WORD_ROWS, rows)]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "base",
            rows_key(
                "families",
                (
                    Column("family", "number"),
                    Column("members", lambda family: [member.path for member in family.members], type=list[str]),
                    Column("read"),
                    rows_key("words", WORD_COLUMNS),
                ),
            ),
            "unfit",
            "further",
            "forward",
        )


WORD_COLUMNS: Columns[Word] = (Column("text"), Column("change"), Column("texts"), Column("symbol"))
WORD_ROWS: Columns[FamilyWord] = (
    Column("family", "family.number"),
    label_column("name", "such as", "family.members.0.name"),
    *(column.of(lambda row: row.word) for column in WORD_COLUMNS),
)


def _told(family: FamilyWords) -> str:
    name = family.members[0].name
    if family.number:
        name = f"Family {family.number} ({count(len(family.members), 'adapter')} such as {name})"
    words = [word.text for word in family.words if not word.symbol] or [word.text for word in family.words]
    return f"{name}: {', '.join(words[:SHOWN]) or 'no word beyond random updates'}."


def explain_families(
    index: FleetIndex,
    families: Sequence[Family],
    alone: Sequence[Member],
    base: ModelSource,
    *,
    forward: bool,
    limit: int,
    device: str,
    dtype: FloatType,
    threads: int | None,
) -> FamilyWordsResult:
    """The families by the words that set them apart; parameters as in `loralens.Fleet.explain`."""
    groups = [*((family.number, family.members) for family in families), *((0, [member]) for member in alone)]
    with restore_settings(base):
        local = LocalModel(base, device=device, dtype=dtype, threads=threads)
        chosen: list[tuple[int, Sequence[Member], list[Adapter]]] = []
        tried, unfit = 0, set[str]()
        for number, members in groups:
            if len(chosen) == limit:
                break
            tried += 1
            # Names and shapes that did not fit once are not tried again.
            if members[0].signature in unfit:
                continue
            if read := list(_fitting(index, members, local)):
                chosen.append((number, members, read))
            else:
                unfit.add(members[0].signature)
        words = _words(local, [read for *_, read in chosen], forward=forward) if chosen else []
    found = [
        FamilyWords(number, members, len(read), own) for (number, members, read), own in zip(chosen, words, strict=True)
    ]
    return FamilyWordsResult(model_label(base), found, tried - len(chosen), len(groups) - tried, forward)


def _fitting(index: FleetIndex, members: Sequence[Member], local: LocalModel) -> Iterator[Adapter]:
    """The adapters that are nearest to the middle of a family and fit the base; none if the nearest one does not."""
    for member in members[:READ]:
        try:
            adapter = index.adapter(member)
            check_applies(local, adapter, member.name)
        except LoraLensError:
            return  # the modules of a family are the same
        yield adapter


def _words(local: LocalModel, groups: Sequence[Sequence[Adapter]], *, forward: bool) -> list[Sequence[Word]]:
    """The words of each group of adapters, minus what the other groups write or say on average."""
    speaker = Speaker(local, bank()[:NEUTRAL])
    vocabulary = speaker.vocabulary
    # One random update stands for the members of a family, whose mean varies less: the levels are on the safe side.
    random = [random_like(group[0], seed) for group in groups for seed in range(DRAWS)]
    if not forward:
        writing = Writing(local.loaded.model)
        with progress("reading the weights", len(groups) + len(random)) as step:
            own = [_mean_scores(writing, group, step) for group in groups]
            nulls = [_mean_scores(writing, [one], step) for one in random]
        found: list[Sequence[Word]] = []
        for place, scores in enumerate(own):
            chance = [one for one in nulls[place * DRAWS : (place + 1) * DRAWS] if one is not None]
            others = [one for other, one in enumerate(own) if other != place and one is not None]
            found.append([] if scores is None else written_words(vocabulary, scores, chance, others))
        return found
    with progress("running the model", len(speaker.texts) + len(speaker.questions)) as step:
        effects = speaker.effects(list(chain(*groups)), random, step)
    told = iter(effects[: len(effects) - len(random)])
    by_group, draws = [list(islice(told, len(group))) for group in groups], effects[len(effects) - len(random) :]
    changes = [
        replace(group[0].changes, by_text=np.mean([effect.changes.by_text for effect in group], axis=0))
        for group in by_group
    ]
    found = []
    for place, group in enumerate(by_group):
        chance_effects = draws[place * DRAWS : (place + 1) * DRAWS]
        size = Size(fmean(effect.kl for effect in group), max(effect.kl for effect in chance_effects))
        apart = changes[place].minus([one for other, one in enumerate(changes) if other != place])
        found.append([] if size.weak else apart.words(vocabulary, [effect.changes for effect in chance_effects]))
    return found


def _mean_scores(writing: Writing, adapters: Sequence[Adapter], step: Step | None) -> Vector | None:
    """The mean over adapters of what their weights write; None if none of them writes."""
    scores = [found for one in adapters if (found := writing.scores(one)) is not None]
    if step:
        step(1)
    return np.asarray(sum(scores) / np.float32(len(scores)), np.float32) if scores else None
