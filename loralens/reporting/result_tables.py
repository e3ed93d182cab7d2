"""Tables that a page shares with the results of other verbs: each verb declares its columns, once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from loralens.analysis.base.amplification import KeptRank
from loralens.analysis.base.intruders import Intruders
from loralens.analysis.compare.pairwise import Pairwise
from loralens.analysis.groups import Group
from loralens.analysis.outliers import Outlier
from loralens.compression.curve import CurvePoint
from loralens.reporting.company import Course
from loralens.reporting.subject import Subject
from loralens.tables.table import Table


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ResultTables:
    """How the numbers of a report become tables: rows and columns of the results of other verbs.

    Attributes
    ----------
    modules : callable
        Adapter → every module measured, in natural order.
    ranks : callable
        Adapter → what every rank takes and loses, one a row.
    groups : callable
        ``"kind"`` or ``"block"``, and the groups → one a row.
    outliers : callable
        Modules that stand apart → one a row.
    amplification, intruders : callable
        Kind → its modules → one kind a row.
    pairs : callable
        Labels of all adapters, and what was compared → one pair a row, that whose cosine is farthest from 0 first.
    checkpoints : callable
        Labels of all adapters, and their run → one checkpoint a row, in order of steps.
    """

    modules: Callable[[Subject], Table[Any]]
    ranks: Callable[[Subject], Table[CurvePoint]]
    groups: Callable[[str, Sequence[Group]], Table[Group]]
    outliers: Callable[[Sequence[Outlier]], Table[Outlier]]
    amplification: Callable[[Mapping[str, Sequence[KeptRank]]], Table[Any]]
    intruders: Callable[[Mapping[str, Sequence[Intruders]]], Table[Any]]
    pairs: Callable[[Sequence[str], Pairwise], Table[Any]]
    checkpoints: Callable[[Sequence[str], Course], Table[Any]]
