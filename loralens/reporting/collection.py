"""Several adapters of a report, measured together: compared pair by pair, or as checkpoints of one run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import final

import numpy as np

from loralens.analysis.compare.clusters import cluster_order, connected_groups
from loralens.analysis.compare.interference import Interaction, Interference, find_interactions, interference
from loralens.analysis.compare.pairwise import Pairwise, pairwise
from loralens.analysis.compare.similarity import Comparison, compare_subspaces
from loralens.analysis.trajectory import Trajectory, measure_trajectory
from loralens.charts.pairwise import Tree, branches_of
from loralens.core.threads import Step
from loralens.errors import MismatchError
from loralens.reporting.subject import Subject

# Pairs whose φ(i, j) is drawn: those of largest |cosine|. Each takes two rows of heat maps on the page.
PAIRS = 6


@final
@dataclass(frozen=True, slots=True)
class Collection:
    """The comparison of every pair of several adapters.

    Attributes
    ----------
    order : sequence of int
        The adapters in the order of the clustering, in which similar ones stand side by side.
    tree : sequence of sequence of (float, float)
        The branches of the clustering, as lines to draw.
    fights, agreements : sequence of Meeting
        Where two adapters work against each other, and where in the same direction.
    compared : mapping of pair of int to Comparison
        The pairs whose φ(i, j) is drawn.
    families : sequence of sequence of int
        Groups of two or more adapters that were initialised with the same random A.
    """

    pairs: Pairwise
    energy: Interference
    order: Sequence[int]
    tree: Tree
    fights: Sequence[Interaction]
    agreements: Sequence[Interaction]
    compared: Mapping[tuple[int, int], Comparison]
    families: Sequence[Sequence[int]]


@final
@dataclass(frozen=True, slots=True)
class CheckpointRun:
    """The adapters as checkpoints of one training run.

    Attributes
    ----------
    order : sequence of int
        The adapters in the order of their steps.
    steps : sequence of int
        The steps, rising.
    losses : mapping of str to sequence of (int, float)
        Name of each logged loss → its steps and values.
    """

    trajectory: Trajectory
    order: Sequence[int]
    steps: Sequence[int]
    losses: Mapping[str, Sequence[tuple[int, float]]]


def measure_collection(subjects: Sequence[Subject], *, threads: int = 1, step: Step | None = None) -> Collection | None:
    """Compare every pair of adapters; None where no two have a module in common.

    ``step`` is called with 1 after every module.

    Raises
    ------
    OptionError
        Fewer than two adapters.
    """
    adapters = [subject.adapter for subject in subjects]
    try:
        pairs = pairwise(adapters, labels=[subject.path for subject in subjects], threads=threads, step=step)
    except MismatchError:
        return None
    tree, order = branches_of(cluster_order(pairs.cosine)[0])
    alike = connected_groups(pairs.shared_initialisation)
    return Collection(
        pairs,
        interference(adapters, pairs.modules, threads=threads, step=step),
        order,
        tree,
        find_interactions(pairs, opposing=True),
        find_interactions(pairs, opposing=False),
        {(s, t): _compare_pair(subjects, pairs, s, t, threads) for s, t in _most_similar_pairs(pairs)},
        [group for group in alike if len(group) > 1],
    )


def _most_similar_pairs(pairs: Pairwise) -> list[tuple[int, int]]:
    """The pairs of largest |cosine|, in the order in which the adapters were given."""
    finite = [(s, t) for s, t in combinations(range(pairs.count), 2) if np.isfinite(pairs.cosine[s, t])]
    # The largest |cosine| first, of equal ones the first pair, so that the same report comes out every time.
    return sorted(sorted(finite, key=lambda pair: -abs(pairs.cosine[pair]))[:PAIRS])


def _compare_pair(subjects: Sequence[Subject], pairs: Pairwise, s: int, t: int, threads: int) -> Comparison:
    holders = [module.holders[s] for module in pairs.modules if module.holders[t] is not None]
    names = [name for name in holders if name is not None]
    labels = subjects[s].path, subjects[t].path
    return compare_subspaces(subjects[s].adapter, subjects[t].adapter, modules=names, labels=labels, threads=threads)


def measure_run(
    subjects: Sequence[Subject],
    steps: Sequence[int | None],
    losses: Mapping[str, Sequence[tuple[int, float]]],
    *,
    threads: int = 1,
) -> CheckpointRun | None:
    """The run of which these adapters are checkpoints; None where a step is unknown or there are several runs."""
    dated = [(step, i) for i, step in enumerate(steps) if step is not None]
    # One unknown step is enough to leave the order of the checkpoints open.
    if len(dated) < len(subjects) or len(subjects) < 2:
        return None
    order = [i for _, i in sorted(dated)]
    ordered = [subjects[i] for i in order]
    try:
        trajectory = measure_trajectory(
            [subject.adapter for subject in ordered], labels=[subject.path for subject in ordered], threads=threads
        )
    except MismatchError:
        return None
    return (
        CheckpointRun(trajectory, order, sorted(step for step, _ in dated), losses)
        if len(trajectory.runs) == 1
        else None
    )
