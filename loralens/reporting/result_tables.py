"""The tables that a page shares with the results of other verbs, whose columns each verb declares once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from loralens.analysis.base.amplification import KeptRank
from loralens.analysis.base.intruders import Intruders
from loralens.analysis.compare.pairwise import Pairwise
from loralens.analysis.groups import Group
from loralens.analysis.outliers import Outlier
from loralens.compression.curve import CurvePoint
from loralens.reporting.collection import CheckpointRun
from loralens.reporting.subject import Subject
from loralens.tables.table import Table


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ResultTables:
    """Functions that turn the numbers of a report into tables with the rows and columns of other verbs' results.

    They are handed in because verbs lie above this room, and imports only go down.

    Attributes
    ----------
    modules : callable
        Adapter → every module measured, in natural order.
    ranks : callable
        Adapter → size and error, one rank per row.
    groups : callable
        ``"kind"`` or ``"block"``, and the groups → one group per row.
    outliers : callable
        Modules that differ from the others of their kind → one module per row.
    amplification, intruders : callable
        Kind → its modules → one kind per row.
    pairs : callable
        Labels of all adapters, and their comparison → one pair per row, the largest |cosine| first.
    checkpoints : callable
        Labels of all adapters, and their run → one checkpoint per row, in the order of steps.
    """

    modules: Callable[[Subject], Table[Any]]
    ranks: Callable[[Subject], Table[CurvePoint]]
    groups: Callable[[str, Sequence[Group]], Table[Group]]
    outliers: Callable[[Sequence[Outlier]], Table[Outlier]]
    amplification: Callable[[Mapping[str, Sequence[KeptRank]]], Table[Any]]
    intruders: Callable[[Mapping[str, Sequence[Intruders]]], Table[Any]]
    pairs: Callable[[Sequence[str], Pairwise], Table[Any]]
    checkpoints: Callable[[Sequence[str], CheckpointRun], Table[Any]]
