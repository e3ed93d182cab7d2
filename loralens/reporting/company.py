"""Company: several adapters of a report together, and what was measured of them."""

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

PAIRS = 6  # pairs whose φ(i, j) is drawn: those of largest |cosine|


@final
@dataclass(frozen=True, slots=True)
class Company:
    """Several adapters, each with each.

    Attributes
    ----------
    pairs : Pairwise
    energy : Interference
    order : sequence of int
        The adapters, near ones side by side.
    tree : sequence of sequence of (float, float)
        The branches over them.
    fights, agreements : sequence of Meeting
    compared : mapping of pair of int to Comparison
        The pairs whose φ(i, j) is drawn.
    families : sequence of sequence of int
        Adapters that began from one random A, two or more each.
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
class Course:
    """The adapters as checkpoints of one run.

    Attributes
    ----------
    found : Trajectory
    order : sequence of int
        The adapters in order of steps.
    steps : sequence of int
        In that order.
    losses : mapping of str to sequence of (int, float)
        What was logged: name → step and value.
    """

    found: Trajectory
    order: Sequence[int]
    steps: Sequence[int]
    losses: Mapping[str, Sequence[tuple[int, float]]]


def company(subjects: Sequence[Subject], *, threads: int = 1, step: Step | None = None) -> Company | None:
    """Each adapter with each; None where no two have a module in common. ``step`` is called with 1 after every module.

    Raises
    ------
    OptionError
        Fewer than two.
    """
    adapters = [one.adapter for one in subjects]
    try:
        pairs = pairwise(adapters, labels=[one.path for one in subjects], threads=threads, step=step)
    except MismatchError:
        return None
    tree, order = branches_of(cluster_order(pairs.cosine)[0])
    alike = connected_groups(pairs.shared_initialisation)
    return Company(
        pairs,
        interference(adapters, pairs.modules, threads=threads, step=step),
        order,
        tree,
        find_interactions(pairs, fights=True),
        find_interactions(pairs, fights=False),
        {(s, t): _compared(subjects, pairs, s, t, threads) for s, t in _nearest(pairs)},
        [group for group in alike if len(group) > 1],
    )


def _nearest(pairs: Pairwise) -> list[tuple[int, int]]:
    """The pairs of largest |cosine|, in the order in which the adapters were given."""
    known = [(s, t) for s, t in combinations(range(pairs.count), 2) if np.isfinite(pairs.cosine[s, t])]
    return sorted(sorted(known, key=lambda pair: -abs(pairs.cosine[pair]))[:PAIRS])


def _compared(subjects: Sequence[Subject], pairs: Pairwise, s: int, t: int, threads: int) -> Comparison:
    held = [one.holders[s] for one in pairs.modules if one.holders[t] is not None]
    names = [name for name in held if name is not None]
    labels = subjects[s].path, subjects[t].path
    return compare_subspaces(subjects[s].adapter, subjects[t].adapter, modules=names, labels=labels, threads=threads)


def course(
    subjects: Sequence[Subject],
    steps: Sequence[int | None],
    losses: Mapping[str, Sequence[tuple[int, float]]],
    *,
    threads: int = 1,
) -> Course | None:
    """The run that these adapters are checkpoints of; None where they say no steps, or are of several runs."""
    known = [(step, i) for i, step in enumerate(steps) if step is not None]
    if len(known) < len(subjects) or len(subjects) < 2:
        return None
    order = [i for _, i in sorted(known)]
    ordered = [subjects[i] for i in order]
    try:
        found = measure_trajectory(
            [one.adapter for one in ordered], labels=[one.path for one in ordered], threads=threads
        )
    except MismatchError:
        return None
    return Course(found, order, sorted(step for step, _ in known), losses) if len(found.runs) == 1 else None
