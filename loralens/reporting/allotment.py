"""The stops of the sliders of a page, and how large a file of any ranks will be.

Every stop is computed here, by the rules by which `loralens compress` chooses; the page only shows it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from loralens.compression.curve import CurvePoint
from loralens.compression.loss import total_error
from loralens.compression.plan import Size, TruncationPlan, is_fused_module
from loralens.core.adapter import Adapter
from loralens.core.ranks import Rule, ranks, shared_ranks
from loralens.core.structured import Structured
from loralens.errors import LoraLensError
from loralens.formats.dialects.sizes import stored_size
from loralens.formats.files.container import DTYPE_NAMES, Files, Stored, sort_by_width

STOPS = 32  # of a slider over sizes

Write = Callable[[Adapter], tuple[Stored, Files]]  # adapter → the tensors and the header of its file
Shapes = Sequence[tuple[int, ...]]


@final
@dataclass(frozen=True, slots=True)
class Dialect:
    """How an adapter would be written.

    Attributes
    ----------
    name : str
    write : callable
        Adapter → what its file holds, no number computed.
    one_rank : bool
        Whether its files have one rank for all modules.
    """

    name: str
    write: Write
    one_rank: bool = False

    def size(self, adapter: Adapter) -> int:
        """Bytes of the file of weights."""
        return stored_size(*self.write(adapter))


@final
@dataclass(frozen=True, slots=True)
class Tensor:
    """One stored tensor: bytes of its entry in the header but for digits, its bytes, and whose rank it grows with.

    ``item`` is the number of the group of modules whose rank is one of its dimensions, and ``unit`` its bytes for each
    direction; −1 and all its bytes where no rank is.
    """

    entry: int
    unit: int
    item: int


@final
@dataclass(frozen=True, slots=True)
class Layout:
    """A safetensors file at any ranks: header bytes beside the entries, and the tensors in their order."""

    head: int
    tensors: Sequence[Tensor]

    def size(self, chosen: Sequence[int]) -> int:
        """Bytes of the file at these ranks, one for each item."""
        length, begin = self.head, 0
        for tensor in self.tensors:
            rank = chosen[tensor.item] if tensor.item >= 0 else 1
            end = begin + tensor.unit * rank
            length += tensor.entry + len(f"{begin}{end}") + (len(str(rank)) if tensor.item >= 0 else 0)
            begin = end
        return 8 + length + -length % 8 + begin


def items(plan: TruncationPlan, dialect: Dialect) -> dict[str, int]:
    """Module name → the number of its item: modules that can only have one rank together share one."""
    shared = shared_ranks(plan.adapter.modules)
    numbers: dict[str, int] = {}
    return {
        name: 0 if dialect.one_rank else numbers.setdefault(shared.get(name, name), len(numbers))
        for name in plan.directions
    }


def layout(plan: TruncationPlan, dialect: Dialect) -> Layout | None:
    """The file at any ranks; None where its size follows no such rule, or it is no safetensors file.

    Which tensor grows with which rank is asked of the writer: in the n-th of a few trials every item has rank 2 whose
    number has its n-th bit set, the others rank 1.
    """
    if any(
        is_fused_module(plan.adapter[name]) or isinstance(plan.adapter[name], Structured) for name in plan.directions
    ):
        return None
    of = items(plan, dialect)
    count = max(of.values(), default=-1) + 1
    try:
        least = _trial(plan, dialect, dict.fromkeys(of, 1))
        if least is None or not count:
            return None
        trials = [dict.fromkeys(of, 2)]
        trials += [{name: 1 + (i >> n & 1) for name, i in of.items()} for n in range((count - 1).bit_length())]
        shapes = [_shapes(least, _trial(plan, dialect, ranks)) for ranks in trials]
        found = _layout(least, shapes[0], shapes[1:])
        return found if found and _holds(found, plan, dialect, of) else None
    except LoraLensError:  # a dialect that cannot hold such ranks
        return None


def _trial(plan: TruncationPlan, dialect: Dialect, ranks: Mapping[str, int]) -> Stored | None:
    stored, files = dialect.write(plan.at(ranks))
    if not files.weights.endswith(".safetensors"):
        return None
    return replace(stored, tensors=sort_by_width(stored.tensors))


def _shapes(least: Stored, trial: Stored | None) -> Shapes | None:
    """The shapes of a trial's tensors; None where other tensors or another text are in it.

    Nothing else is kept of a trial: each has names of its own, and they may be longer than the numbers.
    """
    if trial is None or trial.metadata != least.metadata or list(trial.tensors) != list(least.tensors):
        return None
    return [tensor.shape for tensor in trial.tensors.values()]


def _layout(least: Stored, most: Shapes | None, bits: Sequence[Shapes | None]) -> Layout | None:
    known = [one for one in bits if one is not None]
    if most is None or len(known) < len(bits):
        return None
    tensors = []
    for place, (key, tensor) in enumerate(least.tensors.items()):
        grown = [i for i, (a, b) in enumerate(zip(tensor.shape, most[place], strict=True)) if a != b]
        if len(grown) > 1:
            return None
        moves = [one[place] != tensor.shape for one in known]
        item = sum(1 << n for n, moved in enumerate(moves) if moved) if grown else -1
        tensors.append(Tensor(_entry(key, DTYPE_NAMES[tensor.dtype], tensor.shape, grown), tensor.nbytes, item))
    metadata = "" if least.metadata is None else f'"__metadata__":{_text(dict(least.metadata))},'
    return Layout(len(metadata.encode()) + 2 - 1, tensors)  # braces; the last entry has no comma


def _entry(key: str, dtype: str, shape: Sequence[int], grown: Sequence[int]) -> int:
    """Bytes of an entry, its comma included, without the digits of the rank and of the offsets."""
    dimensions = ",".join("" if i in grown else str(n) for i, n in enumerate(shape))
    text = f'{_text(key)}:{{"dtype":"{dtype}","shape":[{dimensions}],"data_offsets":[,]}},'
    return len(text.encode())


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _holds(found: Layout, plan: TruncationPlan, dialect: Dialect, of: Mapping[str, int]) -> bool:
    """Whether the rule gives the sizes that the writer gives, on ranks of many digits and few."""
    for rank in (1, 3, 12):
        ranks = {name: 1 + (rank + (0 if dialect.one_rank else i)) % 12 for name, i in of.items()}
        chosen = [0] * (max(of.values()) + 1)
        for name, i in of.items():
            chosen[i] = ranks[name]
        if found.size(chosen) != dialect.size(plan.at(ranks)):
            return False
    return True


def size_by(form: Layout, plan: TruncationPlan, dialect: Dialect) -> Size:
    """A function that gives the bytes of the file of an adapter that the plan makes, much sooner than its writer."""
    first = {item: name for name, item in reversed(items(plan, dialect).items())}
    names = [first[item] for item in range(len(first))]
    return lambda adapter: form.size([adapter[name].rank for name in names])


@final
@dataclass(frozen=True, slots=True)
class Stop:
    """One stop of a slider.

    Attributes
    ----------
    value : int
        What is asked for: a rank, or bytes of the file.
    ranks : sequence of int
        Of every module of the plan, in its order.
    bytes : int
        Of the file.
    error : float
    """

    value: int
    ranks: Sequence[int]
    bytes: int
    error: float


def rank_stops(plan: TruncationPlan, dialect: Dialect, points: Sequence[CurvePoint]) -> list[Stop]:
    """One rank for all modules, rising."""
    stops = []
    for point in sorted(points, key=lambda point: point.rank):
        chosen = plan.ranks(Rule("rank", point.rank), one_rank=dialect.one_rank)
        stops.append(Stop(point.rank, list(chosen.values()), point.uniform.bytes, point.uniform.error))
    return stops


def budget_stops(
    plan: TruncationPlan, dialect: Dialect, points: Sequence[CurvePoint], form: Layout | None
) -> list[Stop]:
    """The ranks that save most in files of rising size: those that ``loralens compress --size`` chooses.

    Without a `Layout` the size of every trial would have to be asked of the writer, which takes too long: then the
    budgets are those of the curve, and the ranks are about those of that command.
    """
    costs = {name: plan.direction_bytes(plan.adapter[name]) for name in plan.directions}
    of = items(plan, dialect)
    first = {item: name for name, item in reversed(of.items())}

    def choose(budget: int, size: Callable[[Mapping[str, int]], int] | None) -> dict[str, int]:
        return ranks(
            {name: directions.s for name, directions in plan.directions.items()},
            costs,
            Rule("bytes", budget),
            shared=shared_ranks(plan.adapter.modules),
            least=plan.least(drop_dead=False),
            one_rank=dialect.one_rank,
            widths={name: plan.adapter[name].rank for name in plan.directions},
            size=size,
        )

    stops: dict[int, Stop] = {}
    if form is None:
        for uniform, point in zip(rank_stops(plan, dialect, points), reversed(points), strict=True):
            factors = sum(cost * rank for cost, rank in zip(costs.values(), uniform.ranks, strict=True))
            cheapest = list(choose(factors, None).values())
            stops[point.budget.bytes] = Stop(point.budget.bytes, cheapest, point.budget.bytes, point.budget.error)
        return [stops[size] for size in sorted(stops)]

    def size(chosen: Mapping[str, int]) -> int:
        return form.size([chosen[first[item]] for item in range(len(first))])

    low, high = (edge(point.uniform.bytes for point in points) for edge in (min, max))
    for k in range(STOPS):
        budget = low + round((high - low) * k / (STOPS - 1))
        chosen = choose(budget, size)
        stops[budget] = Stop(budget, list(chosen.values()), size(chosen), total_error(plan.losses(chosen)))
    return list(stops.values())
