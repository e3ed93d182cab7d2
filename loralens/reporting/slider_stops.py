"""The stops of the sliders of a page: the ranks that `loralens compress` chooses, and the size of its file.

Every stop is computed here; the page only shows it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from loralens.compression.loss import total_error
from loralens.compression.plan import CurvePoint, TruncationPlan
from loralens.core.adapter import Adapter
from loralens.core.ranks import Rule
from loralens.formats import stored_size
from loralens.formats.files.container import Files, Stored

# The number of stops of the slider over budgets, in steps of 3 % of its range. For every stop all ranks are chosen
# anew, and the page stores them.
STOPS = 32

Write = Callable[[Adapter], tuple[Stored, Files]]  # adapter → the tensors and the header of its file


@final
@dataclass(frozen=True, slots=True)
class Dialect:
    """The dialect in which a smaller adapter would be written.

    Attributes
    ----------
    write : callable
        Adapter → the tensors and the header of its file. No number of a tensor is computed until it is read.
    one_rank : bool
        Whether a file can only have one rank for all modules.
    """

    name: str
    write: Write
    one_rank: bool = False

    def size(self, adapter: Adapter) -> int:
        """Bytes of the file of weights."""
        return stored_size(*self.write(adapter))


@final
@dataclass(frozen=True, slots=True)
class Stop:
    """One stop of a slider.

    Attributes
    ----------
    value : int
        The position of the slider: a rank, or the parameters that the adapter may have.
    ranks : sequence of int
        The rank of every module, in the order of the plan.
    bytes : int
        The size of the file.
    """

    value: int
    ranks: Sequence[int]
    bytes: int
    error: float


def rank_stops(plan: TruncationPlan, dialect: Dialect, points: Sequence[CurvePoint]) -> list[Stop]:
    """The stops of the slider over ranks: one rank for all modules, rising."""
    stops = []
    choose = plan.chooser("rank", one_rank=dialect.one_rank)
    for point in reversed(points):
        chosen = choose(Rule("rank", point.rank))
        stops.append(Stop(point.rank, list(chosen.values()), point.uniform.bytes, point.uniform.error))
    return stops


def budget_stops(plan: TruncationPlan, dialect: Dialect, points: Sequence[CurvePoint]) -> list[Stop]:
    """The stops of the slider over budgets: the ranks that ``loralens compress --parameters`` chooses, rising."""
    choose = plan.chooser("parameters", one_rank=dialect.one_rank)
    low, high = (edge(point.uniform.parameters for point in points) for edge in (min, max))
    budgets = dict.fromkeys(low + round((high - low) * k / (STOPS - 1)) for k in range(STOPS))
    return [_budget_stop(plan, dialect, budget, choose(Rule("parameters", budget))) for budget in budgets]


def _budget_stop(plan: TruncationPlan, dialect: Dialect, budget: int, chosen: Mapping[str, int]) -> Stop:
    size = dialect.size(plan.at(chosen))
    return Stop(budget, list(chosen.values()), size, total_error(plan.losses(chosen)))
