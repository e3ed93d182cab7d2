"""The verb ``similarity``: compares the directions of adapters with each other and with chance."""

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from loralens.analysis.every_pair import cluster_order, pairwise
from loralens.analysis.interacting_pairs import find_interactions, interference
from loralens.analysis.nested import nesting
from loralens.analysis.two_adapters import KnownBases, compare_subspaces, find_shared_initialisation, side_of
from loralens.choices import Of, Side
from loralens.core.adapter import Adapter
from loralens.core.messages import progress, tell_findings, warn
from loralens.core.stored import same_start
from loralens.core.threads import processor_count
from loralens.exports import takes_options
from loralens.verbs.comparisons.collection_similarity import CollectionSimilarity
from loralens.verbs.comparisons.pair_similarity import NestedSimilarity, PairSimilarity
from loralens.verbs.shared.adapters import Source, labels, read_where_unknown, sources, warn_of_bases, with_grids
from loralens.verbs.shared.options import ModuleChoice, Reading, check_at_least, check_choice

SimilarityResult = NestedSimilarity | PairSimilarity | CollectionSimilarity

THREADS = processor_count()  # modules are independent of each other, and BLAS is limited to one thread


@takes_options
def similarity(
    *adapters: Source,
    of: Of = "update",
    side: Side | None = None,
    phi_rank: int | None = None,
    phi: bool = False,
    selection: ModuleChoice,
    reading: Reading,
) -> SimilarityResult:
    """Compare the directions of adapters with each other and with chance.

    One adapter: its own modules of equal width are compared with each other. Two adapters: φ(i, j), cosine, principal
    angles and CKA of every module. Three and more: every pair, clustered. ``alpha`` and ``scale`` are used for files
    that do not state their own. The folder of a grid of runs stands for its finished runs.

    Parameters
    ----------
    *adapters : path or Adapter
        One, two, or more: files, folders that hold an adapter, Hub ids in the local cache, or what `loralens.load`
        returns. The folder of a grid of runs stands for its finished runs.
    of : str
        The matrix whose directions are compared: ΔW, A alone (as in the LoRA paper), or B alone.

        Whose directions: ``update``, the singular directions of ΔW; ``A`` or ``B``, those of one factor alone. Cosines
        and CKA are always of ΔW.
    side : str, optional
        Whether directions of the inputs or of the outputs are compared. [default: out; of A: in]

        ``in`` or ``out``: the directions of the inputs or of the outputs. The default is ``out``, but ``in`` if ``of``
        is ``A``. The in side of ΔW mostly shows the random start of A, which adapters of one seed have in common.
    phi_rank : int, optional
        Compare at most the N leading directions. [default: all]
    phi : bool
        With --json: also the map φ(i, j) of every module of two adapters, and its chance level.

        The record of the result, which is also its JSON, has the map φ(i, j) of every module of two adapters and its
        chance level. The maps of many adapters are most of the text.
    selection : ModuleChoice
        The options ``modules``, ``block``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Returns
    -------
    NestedSimilarity, PairSimilarity or CollectionSimilarity
        Of one adapter, of two, and of three or more.

    Raises
    ------
    OptionError
        A glob that matches nothing; an unknown ``of`` or ``side``, or a side that A or B does not have.
    FormatError
        A file that is not an adapter; a module that holds NaN or Inf.
    MismatchError
        No module in common; ``of`` is ``A`` or ``B``, but an update has no factors.

    Notes
    -----
    The modules of one adapter are compared with each other if they have the same width. Of three and more adapters
    every pair is compared, and the adapters are clustered. ΔW is never formed.

    Examples
    --------
    $ loralens similarity adapter other
    """
    modules = selection.globs
    check_choice("of", str(of), get_args(Of))
    check_choice("side", side, get_args(Side))
    check_at_least("phi_rank", phi_rank, 1)
    # A and B have one side each. Called here so that asking for the other side is an error before any file is read.
    compared_side = side_of(of, side)
    chosen = with_grids(sources(adapters))
    names = labels(chosen)
    loaded = [read_where_unknown(source, reading) for source in chosen]
    for source, name, adapter in zip(chosen, names, loaded, strict=True):
        # An `Adapter` was read earlier, and its findings were reported then.
        if not isinstance(source, Adapter):
            tell_findings(name, adapter.findings)
    warn_of_bases(names, loaded)
    # One adapter, two, and more are three questions, each with tables of its own.
    if len(loaded) == 1:
        with progress("comparing", 2 * len(loaded[0])) as step:  # every module is read, and then compared
            groups = nesting(
                loaded[0], of=of, side=side, modules=modules, phi_rank=phi_rank, threads=THREADS, step=step
            )
        return NestedSimilarity((names[0],), groups, of, compared_side)
    if len(loaded) == 2:
        return replace(_compare_pair((names[0], names[1]), loaded, of, side, modules, phi_rank), maps=phi)
    return replace(_compare_collection(names, loaded, of, side, modules, phi_rank), maps=phi)


def _compare_pair(
    names: tuple[str, str],
    adapters: Sequence[Adapter],
    of: Of,
    side: Side | None,
    modules: Sequence[str],
    phi_rank: int | None,
) -> PairSimilarity:
    first, second = adapters
    # The smaller of the two: only modules that both adapters have are compared.
    with progress("comparing", min(len(first), len(second))) as step:
        comparison = compare_subspaces(
            first,
            second,
            of=of,
            side=side,
            modules=modules,
            phi_rank=phi_rank,
            labels=names,
            threads=THREADS,
            step=step,
        )
    start = find_shared_initialisation(comparison, recorded=same_start(first, second))
    compared_side = side_of(of, side)
    # A shared start makes φ of the in side large whatever the two tasks are, so users of the in side are warned.
    if start.text and compared_side == "in":
        warn(start.text, start.advice)
    return PairSimilarity(names, comparison, start, of, compared_side)


def _compare_collection(
    names: Sequence[str],
    adapters: Sequence[Adapter],
    of: Of,
    side: Side | None,
    modules: Sequence[str],
    phi_rank: int | None,
) -> CollectionSimilarity:
    directions = KnownBases()
    with progress("comparing", 2 * max(map(len, adapters))) as step:  # every module is read twice
        pairs = pairwise(
            adapters,
            of=of,
            modules=modules,
            phi_rank=phi_rank,
            labels=names,
            directions=directions,
            threads=THREADS,
            step=step,
        )
        energy = interference(adapters, pairs.modules, directions=directions, threads=THREADS, step=step)
    tree, order = cluster_order(pairs.cosine)
    return CollectionSimilarity(
        adapters=tuple(names),
        of=of,
        side=side_of(of, side),
        phi_rank=phi_rank,
        loaded=tuple(adapters),
        directions=directions,
        pairs=pairs,
        energy=energy,
        tree=tree,
        order=order,
        fights=find_interactions(pairs, opposing=True),
        agreements=find_interactions(pairs, opposing=False),
    )
