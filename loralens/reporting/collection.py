"""Several adapters of a report, measured together: compared pair by pair, or as checkpoints of one run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isfinite
from pathlib import Path
from typing import final

from loralens.analysis.every_pair import Pairwise, cluster_order, connected_groups, pairwise
from loralens.analysis.interference import Interaction, Interference, find_interactions, interference
from loralens.analysis.trajectory import Trajectory, measure_trajectory
from loralens.analysis.two_adapters import Comparison, compare_subspaces
from loralens.charts.pairwise import Tree, branches_of
from loralens.core.threads import Step
from loralens.errors import MismatchError
from loralens.formats.records.training import Run
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
    conflicts, agreements : sequence of Interaction
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
    conflicts: Sequence[Interaction]
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
    log : Run
        The losses that the run has logged.
    """

    trajectory: Trajectory
    order: Sequence[int]
    steps: Sequence[int]
    log: Run

    @property
    def losses(self) -> dict[str, list[tuple[int, float]]]:
        """Name of each logged loss → its steps and values."""
        logs = (("loss", self.log.train), ("eval loss", self.log.evaluation))
        return {name: [(loss.step, loss.value) for loss in logged] for name, logged in logs if logged}


def measure_collection(subjects: Sequence[Subject], *, threads: int = 1, step: Step | None = None) -> Collection | None:
    """Compare every pair of adapters; None where no two have a module in common.

    ``step`` is called with 1 after every module.

    Raises
    ------
    OptionError
        Fewer than two adapters.
    """
    # Adapters of different models are not an error here, because the rest of the page describes each of them.
    adapters = [subject.adapter for subject in subjects]
    try:
        pairs = pairwise(adapters, labels=[subject.path for subject in subjects], threads=threads, step=step)
    except MismatchError:
        return None
    tree, order = branches_of(cluster_order(pairs.cosine)[0])
    cosines = finite_cosines(pairs)
    # The pairs of largest |cosine|. If cosines are equal, the first pair is taken, so that the same report comes out
    # every time. The pairs are then put back in the order in which the adapters were given.
    most_similar = sorted(sorted(cosines, key=lambda pair: -abs(cosines[pair]))[:PAIRS])
    return Collection(
        pairs,
        interference(adapters, pairs.modules, threads=threads, step=step),
        order,
        tree,
        find_interactions(pairs, opposing=True),
        find_interactions(pairs, opposing=False),
        {(s, t): _compare_pair(subjects, pairs, s, t, threads) for s, t in most_similar},
        [group for group in connected_groups(pairs.shared_initialisation) if len(group) > 1],
    )


def finite_cosines(pairs: Pairwise) -> dict[tuple[int, int], float]:
    """Every pair of adapters → the cosine of their updates, where neither of them is 0."""
    every = {(s, t): float(pairs.cosine[s, t]) for s, t in combinations(range(pairs.count), 2)}
    return {pair: cosine for pair, cosine in every.items() if isfinite(cosine)}


def _compare_pair(subjects: Sequence[Subject], pairs: Pairwise, s: int, t: int, threads: int) -> Comparison:
    holders = [module.holders[s] for module in pairs.modules if module.holders[t] is not None]
    names = [name for name in holders if name is not None]
    labels = subjects[s].path, subjects[t].path
    return compare_subspaces(subjects[s].adapter, subjects[t].adapter, modules=names, labels=labels, threads=threads)


def measure_run(subjects: Sequence[Subject], log: Run, *, threads: int = 1) -> CheckpointRun | None:
    """The run of which these adapters are checkpoints; None where a step is unknown or there are several runs."""
    steps = {checkpoint.path: checkpoint.step for checkpoint in log.checkpoints}
    adapter_steps = [steps.get(Path(subject.path)) for subject in subjects]
    dated = sorted((step, i) for i, step in enumerate(adapter_steps) if step is not None)
    # If one step is unknown, the order of the checkpoints is unknown.
    if len(dated) < len(subjects) or len(subjects) < 2:
        return None
    order = [i for _, i in dated]
    adapters, labels = [subjects[i].adapter for i in order], [subjects[i].path for i in order]
    try:
        trajectory = measure_trajectory(adapters, labels=labels, threads=threads)
    except MismatchError:  # no two have a module in common
        return None
    # Checkpoints that began from different random factors belong to several runs. Their directions cannot be compared
    # with one last checkpoint.
    if len(trajectory.runs) > 1:
        return None
    return CheckpointRun(trajectory, order, [step for step, _ in dated], log)
