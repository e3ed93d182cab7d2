"""The verb ``similarity``: compares the directions of adapters, beside what chance would give."""

from collections.abc import Sequence
from os import cpu_count
from typing import Unpack, get_args

from loralens.analysis.compare.clusters import cluster_order
from loralens.analysis.compare.initialisation import initialisation
from loralens.analysis.compare.interference import find_interactions, interference
from loralens.analysis.compare.nested import nesting
from loralens.analysis.compare.pairwise import Of, Side, pairwise
from loralens.analysis.compare.similarity import compare_subspaces, side_of
from loralens.core.adapter import Adapter
from loralens.core.messages import tell_findings, warn
from loralens.core.progress import progress
from loralens.core.training import same_start
from loralens.verbs.inputs.adapters import Reading, Source, labels, read_where_unknown, sources
from loralens.verbs.inputs.bases import warn_of_bases
from loralens.verbs.inputs.choices import check_at_least, check_choice
from loralens.verbs.outputs.collection_similarity import CollectionSimilarity
from loralens.verbs.outputs.nested_similarity import NestedSimilarity
from loralens.verbs.outputs.pair_similarity import PairSimilarity

SimilarityResult = NestedSimilarity | PairSimilarity | CollectionSimilarity

THREADS = cpu_count() or 1


def similarity(
    *adapters: Source,
    of: Of = "update",
    side: Side | None = None,
    modules: Sequence[str] = (),
    phi_rank: int | None = None,
    **reading: Unpack[Reading],
) -> SimilarityResult:
    """Compare the directions of adapters, beside what chance would give.

    One adapter: its own modules of equal width are compared with each other. Two adapters: φ(i, j), cosine, principal
    angles and CKA of every module. Three and more: every pair, clustered. ``alpha`` and ``scale`` are used for files
    that do not state their own. ΔW is never formed.

    Parameters
    ----------
    *adapters : path or Adapter
        One, two, or more: files, folders that hold an adapter, Hub ids in the local cache, or what `loralens.load`
        returns.
    of : str
        Whose directions: ``update``, the singular directions of ΔW; ``A`` or ``B``, those of one factor alone.
        Cosines and CKA are always of ΔW.
    side : str, optional
        ``in`` or ``out``: the directions of the inputs or of the outputs. The default is ``in``, and ``out`` of B.
    modules : sequence of str
        Only modules whose name or kind matches one of these glob patterns.
    phi_rank : int, optional
        Compare at most this many leading directions; by default all.
    **reading : Reading
        How files are read; ``alpha`` and ``scale`` count for files that do not say their own.

    Returns
    -------
    NestedSimilarity, PairSimilarity or CollectionSimilarity
        Of one adapter, of two, and of three or more.

    Raises
    ------
    OptionError
        A glob that matches nothing; an unknown ``of`` or ``side``, or a side that A or B has not.
    FormatError
        A file that is no adapter; a module that holds NaN or Inf.
    MismatchError
        No module in common; A or B asked of an update that has no factors.
    """
    check_choice("of", str(of), get_args(Of))
    check_choice("side", side, get_args(Side))
    check_at_least("phi_rank", phi_rank, 1)
    side_of(of, side)  # what A and B do not have is said before the work
    chosen = sources(adapters)
    names = labels(chosen)
    loaded = [read_where_unknown(source, reading) for source in chosen]
    for source, name, adapter in zip(chosen, names, loaded, strict=True):
        if not isinstance(source, Adapter):
            tell_findings(name, adapter.findings)
    warn_of_bases(names, loaded)
    if len(loaded) == 1:
        return _nested(names[0], loaded[0], of, side, modules, phi_rank)
    if len(loaded) == 2:
        return _pair(names, loaded, of, side, modules, phi_rank)
    return _collection(names, loaded, of, side, modules, phi_rank)


def _nested(
    name: str, adapter: Adapter, of: Of, side: Side | None, modules: Sequence[str], phi_rank: int | None
) -> NestedSimilarity:
    with progress("comparing", 2 * len(adapter)) as step:
        groups = nesting(adapter, of=of, side=side, modules=modules, phi_rank=phi_rank, threads=THREADS, step=step)
    return NestedSimilarity((name,), groups, of, side_of(of, side))


def _pair(
    names: Sequence[str],
    adapters: Sequence[Adapter],
    of: Of,
    side: Side | None,
    modules: Sequence[str],
    phi_rank: int | None,
) -> PairSimilarity:
    first, second = adapters
    called = (names[0], names[1])
    with progress("comparing", min(len(first), len(second))) as step:
        comparison = compare_subspaces(
            first,
            second,
            of=of,
            side=side,
            modules=modules,
            phi_rank=phi_rank,
            labels=called,
            threads=THREADS,
            step=step,
        )
    start = initialisation(comparison, recorded=same_start(first, second))
    if start.text:
        warn(start.text, start.advice)
    return PairSimilarity(called, comparison, start, of, side_of(of, side))


def _collection(
    names: Sequence[str],
    adapters: Sequence[Adapter],
    of: Of,
    side: Side | None,
    modules: Sequence[str],
    phi_rank: int | None,
) -> CollectionSimilarity:
    with progress("comparing", 2 * max(map(len, adapters))) as step:  # every module is read twice
        pairs = pairwise(adapters, of=of, modules=modules, phi_rank=phi_rank, labels=names, threads=THREADS, step=step)
        energy = interference(adapters, pairs.modules, threads=THREADS, step=step)
    tree, order = cluster_order(pairs.cosine)
    return CollectionSimilarity(
        adapters=tuple(names),
        of=of,
        side=side_of(of, side),
        sides=tuple(end for end in pairs.overlaps if side is None or of != "update" or end == side),
        phi_rank=phi_rank,
        loaded=tuple(adapters),
        pairs=pairs,
        energy=energy,
        tree=tree,
        order=order,
        fights=find_interactions(pairs, opposing=True),
        agreements=find_interactions(pairs, opposing=False),
    )
