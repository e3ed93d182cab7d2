"""The verb ``similarity``: compares the directions of adapters with each other and with chance."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isnan
from typing import Any, TypeVar, get_args

import numpy as np

from loralens.analysis.every_pair import (
    Pairwise,
    cluster_order,
    compare_every_pair,
    connected_groups,
    known_mean,
    pairwise,
)
from loralens.analysis.interacting_pairs import (
    CONFLICT,
    LARGE,
    Interaction,
    Interference,
    far_cosine,
    find_interactions,
    in_words,
    interference,
    is_same,
)
from loralens.analysis.nested import nesting
from loralens.analysis.two_adapters import (
    SAME_START,
    compare_subspaces,
    find_shared_initialisation,
    side_of,
)
from loralens.choices import Of, Side
from loralens.core.adapter import Adapter
from loralens.core.messages import progress, tell_findings, warn
from loralens.core.stored import same_start
from loralens.core.threads import processor_count
from loralens.exports import takes_options
from loralens.linalg.factor import Floats
from loralens.tables.numbers import JsonMatrix, count, fixed, number, signed, span
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Columns, Keys, Rows, Table, label_column, rows_key
from loralens.verbs.comparisons.pair_similarity import (
    JSON_COLUMNS,
    ModuleSimilarity,
    NestedSimilarity,
    Pair,
    PairSimilarity,
    pair_columns,
    record_columns,
)
from loralens.verbs.shared.adapters import (
    Source,
    labels,
    read_where_unknown,
    short_labels,
    sources,
    warn_of_bases,
    with_grids,
)
from loralens.verbs.shared.options import ModuleChoice, Reading, check_at_least, check_choice
from loralens.version import __version__

Kept = TypeVar("Kept")

SHARES = ("shared", "private", "shared_chance", "private_chance")  # the arrays of `Interference`
MATRIX = 12  # adapters whose matrices fit on a terminal of 120 columns
SAME_NAMED = 3  # pairs that are practically the same adapter and that the conclusion names


@dataclass(frozen=True, slots=True, repr=False)
class CollectionSimilarity(Tabular):
    """Three or more adapters in pairs, clustered, with the places where two of them oppose each other or agree.

    Attributes
    ----------
    adapters : tuple of str
        The labels of the adapters.
    of : str
        Whose directions were compared: ``update``, ``A`` or ``B``.
    side : str
        The side of φ in the tables, and of the φ maps of every pair.
    phi_rank : int or None
        The largest number of leading directions that φ compares.
    energy : Interference
        The shared and the private energy in the modules of ``pairs``.
    order : sequence of int
        The indices of the adapters, with similar ones together.
    fights, agreements : sequence of Interaction
        The modules in which two updates oppose each other, and in which they agree; the largest contribution first.
    maps : bool
        Whether the record has the map φ(i, j) of every module of every pair.
    """

    adapters: tuple[str, ...]
    of: Of
    side: Side
    phi_rank: int | None
    loaded: tuple[Adapter, ...]
    pairs: Pairwise
    energy: Interference
    order: Sequence[int]
    fights: Sequence[Interaction]
    agreements: Sequence[Interaction]
    maps: bool = False

    @property
    def labels(self) -> list[str]:
        """The paths of the adapters without the folders that all of them share."""
        return short_labels(self.adapters)

    @property
    def cosine(self) -> Floats:
        """Cosine of the whole updates of every pair on the modules that both have, shape (T, T); NaN if one is 0."""
        return self.pairs.cosine

    @property
    def by_cosine(self) -> list[Pair]:
        """The pairs of adapters that have a cosine, by falling |cosine|."""
        return [pair for pair in pairs_by_cosine(self.pairs) if not isnan(self.cosine[pair])]

    def tables(self) -> list[Table[Any]]:
        """The adapters, the matrices if they fit, the pairs by |cosine|, and where two oppose each other or agree."""
        tables: list[Table[Any]] = [self._adapters_table()]
        # A larger matrix would lose columns on a terminal; --json has all of them.
        if self.pairs.count <= MATRIX:
            tables.append(self._matrix("cosine of the updates", self.pairs.cosine))
            title = f"φ, {self.side} side, mean over modules (chance {self._chance(self.side)})"
            tables.append(self._matrix(title, self.pairs.phi(self.side)))
            tables.append(self._matrix("shared initialisation: cosine of A", self.pairs.shared_initialisation))
        title = "pairs, the largest |cosine| first"
        table = adapter_pairs_table(title, self.pairs, self.labels, (self.side,), self.by_cosine)
        far = f"{far_cosine(self.pairs):.1f} standard deviations from chance"
        rule = f"each module with |cosine| ≥ {LARGE} and at least {far}"
        return [
            *tables,
            table,
            self._interactions_table(f"two oppose each other ({rule})", self.fights),
            self._interactions_table(f"two agree ({rule})", self.agreements),
        ]

    def listing(self) -> list[Table[Pair]]:
        """Every pair of adapters, one pair a row."""
        every = list(combinations(range(self.pairs.count), 2))
        return [adapter_pairs_table("", self.pairs, self.labels, tuple(self.pairs.overlaps), every)]

    def conclusion(self) -> list[str]:
        """The pairs that are practically the same adapter, else the nearest pair; and the worst opposition of two."""
        pairs = self.by_cosine
        if not pairs:
            return ["No two of these adapters can be compared: they have no module in common, or ΔW is 0."]
        same = [pair for pair in pairs if is_same(float(self.cosine[pair]))]
        lines = [self._on_pair(pair) for pair in same[:SAME_NAMED]]
        if len(same) > SAME_NAMED:
            lines.append(f"So are {count(len(same) - SAME_NAMED, 'more pair')}.")
        # A pair that was named as the same is not named again as the nearest one.
        distinct = [pair for pair in pairs if pair not in same]
        if distinct:
            most = f"Of the {len(distinct)} {'other ' if same else ''}pairs the largest |cosine| is"
            lines.append(f"{most} {abs(self.cosine[distinct[0]]):.3f}: {self._on_pair(distinct[0])}")
        if self.fights:
            opposed = self.fights[0]
            names = f"{self.labels[opposed.first]} and {self.labels[opposed.second]}"
            # "conflict" is used only if the opposition takes away half of the sum or more.
            verb = "conflict" if opposed.cosine <= CONFLICT else "oppose each other"
            lines.append(f"{names} {verb} most in {opposed.location} (cosine {signed(opposed.cosine)}).")
        else:
            lines.append(f"No two clearly oppose each other in any module (cosine {fixed('.1f')(-LARGE)} or less).")
        return lines

    def _on_pair(self, pair: Pair) -> str:
        first, second = (self.labels[t] for t in pair)
        cosine, z = float(self.cosine[pair]), float(self.pairs.cosine_z[pair])
        return f"{first} and {second} {in_words(cosine, z)} (cosine {signed(cosine)})."

    def sentences(self) -> list[str]:
        """Which adapters cannot be compared, how many modules pairs have in common, and which began from one A."""
        pairs, labels = self.pairs, self.labels
        sentences = [
            f"not compared: {label} has no module of the others' names and shapes"
            for t, label in enumerate(labels)
            if not pairs.ranks[:, t].any()
        ]
        # Off the diagonal, on which each adapter has all its modules in common with itself.
        counts = pairs.common[~np.eye(pairs.count, dtype=bool)]
        low, high = counts.min(), counts.max()
        if low < max(high, len(pairs.modules)):
            sentences += [f"pairs have {low} to {high} modules in common: each is compared on those", ""]
        # A group of one began alone.
        families = [group for group in connected_groups(pairs.shared_initialisation) if len(group) > 1]
        rule = f"cosine of A ≥ {SAME_START}"
        sentences += [f"began from one A ({rule}): {', '.join(labels[t] for t in group)}" for group in families]
        if families and self.side == "in":
            warning = "between these, φ of the in side shows the common start, not a common task: read the out side"
            sentences += [f"  {warning}", ""]
        return sentences

    def _pairs(self) -> list[dict[str, Any]]:
        """The records of every pair.

        With a hundred adapters of 12 modules they take 70 MB of text; `json_pieces` never holds all of it.
        """
        return [
            {"first": s, "second": t, "modules": modules} for s, t, modules in self._pair_records(lambda record: record)
        ]

    def json_pieces(self) -> Iterator[str]:
        """The text of that JSON object in pieces, one pair of adapters after the other."""
        # The object is opened without its brace at the end, and the pairs, which come last, follow.
        head = json.dumps({"loralens": __version__, **Table("", SUMMARY, ()).recorder()(self)})
        yield f'{head[:-1]}, "pairs": ['
        separator = ""
        for s, t, modules in self._pair_records(json.dumps):
            yield f'{separator}{{"first": {s}, "second": {t}, "modules": [{", ".join(modules)}]}}'
            separator = ", "
        yield "]}"

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object; the pairs come last."""
        pair = {"first": int, "second": int, "modules": Rows(ModuleSimilarity, JSON_COLUMNS)}
        return (*SUMMARY, Column("pairs", cls._pairs, type=(pair,)))

    def _pair_records(self, keep: Callable[[dict[str, Any]], Kept]) -> Iterator[tuple[int, int, list[Kept]]]:
        """The indices of every pair, and what is kept of the record of each module that both have."""
        record = Table("", record_columns(maps=self.maps), ()).recorder()
        return compare_every_pair(
            self.loaded,
            self.pairs.modules,
            of=self.of,
            side=self.side,
            phi_rank=self.phi_rank,
            maps=self.maps,
            keep=lambda name, similarity: keep(record(ModuleSimilarity(name, similarity))),
        )

    def _adapters_table(self) -> Table[int]:
        """The adapters, one adapter a row, in the order of the clusters."""
        pairs, labels = self.pairs, self.labels
        places = {t: place for place, t in enumerate(self.order, start=1)}
        groups = enumerate(connected_groups(pairs.shared_initialisation), start=1)
        start = {t: number for number, group in groups for t in group}

        ranks = [
            sorted({int(rank) for rank in column if rank}) for column in pairs.ranks.T
        ]  # 0 where it lacks a module
        norms = [float((column**2).sum() ** 0.5) for column in pairs.norms.T]

        def share(key: str, title: str, priority: int, about: str) -> Column[int]:
            values = known_mean(getattr(self.energy, key))
            return Column(key, values.__getitem__, title, fixed(".2%"), priority=priority, about=about)

        columns: Columns[int] = (
            Column("place", places.__getitem__, "#", priority=ALWAYS),
            label_column("adapter", "adapter", labels.__getitem__),
            Column("modules", (pairs.ranks > 0).sum(axis=0).__getitem__, "modules", priority=4),
            Column("ranks", ranks.__getitem__, "r", span, priority=6),
            Column(
                "frobenius",
                lambda t: norms[t] if ranks[t] else None,
                "‖ΔW‖F",
                number,
                priority=7,
                about="length of ΔW",
            ),
            share("shared", "shared", ALWAYS, "part of ‖ΔW‖² inside the directions of all others, on both sides"),
            share("shared_chance", "by chance", 5, "shared, if directions were random"),
            share("private", "private", 8, "part of ‖ΔW‖² outside the directions of all others, on both sides"),
            share("private_chance", "by chance", 5, "private, if directions were random"),
            Column(
                "start", start.__getitem__, "start", priority=3, about="adapters of one number began from one random A"
            ),
        )
        energy = "energy inside and outside the others' directions"
        title = f"{pairs.count} adapters, near ones side by side; {energy}"
        return Table(title, columns, self.order, whole=True)  # the numbers of the matrices stand here

    def _matrix(self, title: str, values: Floats) -> Table[int]:
        """The values of every pair, with the adapters down and across in the order of the clusters."""
        places, down = {t: place for place, t in enumerate(self.order, start=1)}, values.T.tolist()
        columns: Columns[int] = (
            Column("place", places.__getitem__, "#", priority=ALWAYS),
            label_column("adapter", " ", self.labels.__getitem__),
            # Headed by a number, as twelve names would not fit; the first columns say which adapter has it.
            *(Column(f"{place}", down[t].__getitem__, f"{place}", fixed(".3f")) for t, place in places.items()),
        )
        return Table(title, columns, self.order, whole=True)

    def _chance(self, side: Side) -> str:
        """The chance level of φ, or its range if ranks differ."""
        # Without the diagonal: φ of an adapter with itself is not a comparison.
        levels = self.pairs.chance(side)[~np.eye(self.pairs.count, dtype=bool)]
        return span(levels[~np.isnan(levels)].tolist(), number, " to ")

    def _interactions_table(self, title: str, interactions: Sequence[Interaction]) -> Table[Interaction]:
        """Places in which two adapters oppose each other, or agree; those with most weight first."""
        labels = self.labels
        columns: Columns[Interaction] = (
            label_column("first", "adapter", lambda row: labels[row.first]),
            label_column("second", "and", lambda row: labels[row.second]),
            label_column("location", "in"),
            Column("modules", "modules", "modules", priority=5),
            Column("cosine", "cosine", "cosine", signed, priority=ALWAYS),
            Column("weight", "weight", "of all", signed, priority=3, about="part of the whole cosine"),
        )
        return Table(title, columns, interactions)


def _interference_records(result: CollectionSimilarity) -> list[dict[str, Any]]:
    return [
        {
            "name": module.name,
            "shape": module.shape,
            "cosine": result.pairs.cosines[m],
            **{key: getattr(result.energy, key)[m] for key in SHARES},
        }
        for m, module in enumerate(result.pairs.modules)
    ]


def _by_side(key: str) -> Column[CollectionSimilarity]:
    def value(result: CollectionSimilarity) -> dict[Side, Floats]:
        return {side: getattr(result.pairs, key)(side) for side in result.pairs.overlaps}

    return Column(key, value, type=dict[str, JsonMatrix])


INTERACTION_COLUMNS: list[Column[Interaction]] = [
    Column(key) for key in ("first", "second", "stack", "blocks", "kinds", "modules", "cosine", "weight")
]
# All but the pairs, for JSON.
SUMMARY: Columns[CollectionSimilarity] = (
    Column("of"),
    Column("side"),
    Column("adapters"),
    Column("cosine", type=JsonMatrix),
    Column("cosine_z", "pairs.cosine_z", type=JsonMatrix),
    _by_side("phi"),
    _by_side("chance"),
    Column("shared_initialisation", "pairs.shared_initialisation", type=JsonMatrix),
    Column("common_modules", "pairs.common", type=list[list[int]]),
    Column("order"),
    Column("groups", lambda result: connected_groups(result.pairs.shared_initialisation), type=list[list[int]]),
    Column(
        "interference",
        _interference_records,
        type=({"name": str, "shape": list[int], "cosine": JsonMatrix, **dict.fromkeys(SHARES, list[float])},),
    ),
    rows_key("fights", INTERACTION_COLUMNS),
    rows_key("agreements", INTERACTION_COLUMNS),
)


def pairs_by_cosine(pairs: Pairwise) -> list[Pair]:
    """The pairs of adapters by falling |cosine|; a pair without a cosine counts as 0."""
    cosine = np.nan_to_num(pairs.cosine)
    return sorted(combinations(range(pairs.count), 2), key=lambda pair: -abs(cosine[pair]))


def adapter_pairs_table(
    title: str, pairs: Pairwise, labels: Sequence[str], sides: Sequence[Side], rows: Sequence[Pair]
) -> Table[Pair]:
    """Pairs of adapters, one pair a row, with φ on these sides."""
    columns = pair_columns(
        labels,
        "adapter",
        [
            ("cosine", pairs.cosine, "cosine", "+.3f", ALWAYS, "⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖); chance 0"),
            ("cosine_z", pairs.cosine_z, "z", "+.1f", 8, "standard deviations from chance"),
            *(
                column
                for side in sides
                for column in (
                    (("phi", side), pairs.phi(side), f"φ {side}", ".3f", 7, "of all directions, mean over modules"),
                    (("chance", side), pairs.chance(side), "by chance", ".3f", 5, f"of φ, {side} side"),
                )
            ),
            (
                "shared_initialisation",
                pairs.shared_initialisation,
                "cosine of A",
                ".3f",
                6,
                f"from {SAME_START:g} on they began from the same random A",
            ),
        ],
    )
    columns.insert(2, Column("modules", pairs.common.__getitem__, "modules", priority=4))
    return Table(title, columns, rows)


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
        is ``A``. The in side of ΔW mostly shows the random initialisation of A, which adapters of one seed share.
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
    chosen_modules: dict[str, Any] = {"of": of, "modules": modules, "phi_rank": phi_rank, "threads": THREADS}
    first, *others = loaded
    # One adapter, two, and more are three questions, each with tables of its own.
    if not others:
        with progress("comparing", 2 * len(first)) as step:  # every module is read, and then compared
            groups = nesting(first, side=side, step=step, **chosen_modules)
        return NestedSimilarity((names[0],), groups, of, compared_side)
    if len(others) == 1:
        second, pair = others[0], (names[0], names[1])
        # The smaller of the two: only modules that both adapters have are compared.
        with progress("comparing", min(len(first), len(second))) as step:
            comparison = compare_subspaces(first, second, side=side, labels=pair, step=step, **chosen_modules)
        start = find_shared_initialisation(comparison, recorded=same_start(first, second))
        # A shared initialisation makes φ of the in side large, whatever the tasks are, so a warning is given.
        if start.text and compared_side == "in":
            warn(start.text, start.advice)
        return PairSimilarity(pair, comparison, start, of, compared_side, phi)
    with progress("comparing", 2 * max(map(len, loaded))) as step:  # every module is read twice
        pairs = pairwise(loaded, labels=names, step=step, **chosen_modules)
        energy = interference(loaded, pairs.modules, threads=THREADS, step=step)
    return CollectionSimilarity(
        adapters=tuple(names),
        of=of,
        side=compared_side,
        phi_rank=phi_rank,
        loaded=tuple(loaded),
        pairs=pairs,
        energy=energy,
        order=cluster_order(pairs.cosine)[1],
        fights=find_interactions(pairs, opposing=True),
        agreements=find_interactions(pairs, opposing=False),
        maps=phi,
    )
