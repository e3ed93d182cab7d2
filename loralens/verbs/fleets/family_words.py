"""The words that set the families of a fleet apart from each other, on a base that can be run."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from statistics import fmean

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
from loralens.verbs.fleets.group_answers import FamilyWords, FamilyWordsResult
from loralens.verbs.models.models import ModelSource, model_label, restore_settings
from loralens.verbs.served.predictions import LocalModel, bank, check_applies
from loralens.verbs.served.vocabulary import DRAWS, NEUTRAL, Speaker, Writing

READ = 3  # members of a family that are read, those nearest to its middle


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
