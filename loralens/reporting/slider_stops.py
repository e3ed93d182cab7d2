"""The stops of the sliders of a page, and the size of an adapter file at any ranks.

Every stop is computed here, with the rules by which `loralens compress` chooses ranks; the page only shows it.
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

STOPS = 32  # of the slider over sizes: steps of 3 % of its range, each of which costs a choice of all ranks

Write = Callable[[Adapter], tuple[Stored, Files]]  # adapter → the tensors and the header of its file
Shapes = Sequence[tuple[int, ...]]


@final
@dataclass(frozen=True, slots=True)
class Dialect:
    """The dialect in which a smaller adapter would be written.

    Attributes
    ----------
    write : callable
        Adapter → the content of its file, before any number is computed.
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
class TensorSize:
    """One stored tensor of a file, whose size grows with the rank of one group of modules, or not at all.

    Attributes
    ----------
    entry : int
        Bytes of its entry in the header, without the digits of rank and offsets.
    unit : int
        Its bytes per direction; all its bytes where no dimension is a rank.
    item : int
        The number of the group of modules whose rank is one of its dimensions; −1 where no dimension is a rank.
    """

    entry: int
    unit: int
    item: int


@final
@dataclass(frozen=True, slots=True)
class FileLayout:
    """The size of a safetensors file at any ranks: header bytes outside the entries, and its tensors in order."""

    head: int
    tensors: Sequence[TensorSize]

    def size(self, chosen: Sequence[int]) -> int:
        """Bytes of the file at these ranks, one rank for each group."""
        length, begin = self.head, 0
        for tensor in self.tensors:
            rank = chosen[tensor.item] if tensor.item >= 0 else 1
            end = begin + tensor.unit * rank
            length += tensor.entry + len(f"{begin}{end}") + (len(str(rank)) if tensor.item >= 0 else 0)
            begin = end
        return 8 + length + -length % 8 + begin  # the header: 8 bytes for its length, then padded to a multiple of 8


def rank_groups(plan: TruncationPlan, dialect: Dialect) -> dict[str, int]:
    """Module name → the number of its group: modules that must have the same rank form one."""
    shared = shared_ranks(plan.adapter.modules)
    numbers: dict[str, int] = {}
    return {
        name: 0 if dialect.one_rank else numbers.setdefault(shared.get(name, name), len(numbers))
        for name in plan.directions
    }


def find_layout(plan: TruncationPlan, dialect: Dialect) -> FileLayout | None:
    """The rule that gives the size of the file at any ranks; None where there is none, or no safetensors file.

    The writer itself shows which tensor grows with the rank of which group. In a first trial all groups have rank 1, in
    a second all have rank 2. In the n-th trial after these, the groups whose number has bit n set have rank 2 and the
    others rank 1. So the trials in which a tensor grew spell the number of its group in binary, and few trials suffice.
    """
    # The rank of a fused or structured module is not a dimension of its tensors alone.
    if any(
        is_fused_module(plan.adapter[name]) or isinstance(plan.adapter[name], Structured) for name in plan.directions
    ):
        return None
    of = rank_groups(plan, dialect)
    count = max(of.values(), default=-1) + 1
    try:
        least = _trial(plan, dialect, dict.fromkeys(of, 1))
        if least is None or not count:
            return None
        trials = [dict.fromkeys(of, 2)]
        trials += [{name: 1 + (i >> n & 1) for name, i in of.items()} for n in range((count - 1).bit_length())]
        shapes = [_shapes(least, _trial(plan, dialect, ranks)) for ranks in trials]
        rule = _layout(least, shapes[0], shapes[1:])
        return rule if rule and _matches_writer(rule, plan, dialect, of) else None
    except LoraLensError:  # a dialect that cannot hold such ranks
        return None


def _trial(plan: TruncationPlan, dialect: Dialect, ranks: Mapping[str, int]) -> Stored | None:
    stored, files = dialect.write(plan.at(ranks))
    if not files.weights.endswith(".safetensors"):
        return None
    return replace(stored, tensors=sort_by_width(stored.tensors))


def _shapes(least: Stored, trial: Stored | None) -> Shapes | None:
    """The shapes of a trial's tensors; None where its tensors or its metadata differ from those of the least ranks.

    Only shapes are kept, as every trial has its own copy of the names, which may take more memory than the numbers.
    """
    if trial is None or trial.metadata != least.metadata or list(trial.tensors) != list(least.tensors):
        return None
    return [tensor.shape for tensor in trial.tensors.values()]


def _layout(least: Stored, most: Shapes | None, bits: Sequence[Shapes | None]) -> FileLayout | None:
    followed = [shapes for shapes in bits if shapes is not None]
    if most is None or len(followed) < len(bits):
        return None
    tensors = []
    for place, (key, tensor) in enumerate(least.tensors.items()):
        grown = [i for i, (a, b) in enumerate(zip(tensor.shape, most[place], strict=True)) if a != b]
        if len(grown) > 1:
            return None
        moves = [shapes[place] != tensor.shape for shapes in followed]
        item = sum(1 << n for n, moved in enumerate(moves) if moved) if grown else -1
        tensors.append(TensorSize(_entry(key, DTYPE_NAMES[tensor.dtype], tensor.shape, grown), tensor.nbytes, item))
    metadata = "" if least.metadata is None else f'"__metadata__":{_json_text(dict(least.metadata))},'
    return FileLayout(len(metadata.encode()) + 2 - 1, tensors)  # two braces, and no comma after the last entry


def _entry(key: str, dtype: str, shape: Sequence[int], grown: Sequence[int]) -> int:
    """Bytes of a header entry with its comma, without the digits of the rank and of the offsets."""
    dimensions = ",".join("" if i in grown else str(n) for i, n in enumerate(shape))
    text = f'{_json_text(key)}:{{"dtype":"{dtype}","shape":[{dimensions}],"data_offsets":[,]}},'
    return len(text.encode())


def _json_text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _matches_writer(rule: FileLayout, plan: TruncationPlan, dialect: Dialect, of: Mapping[str, int]) -> bool:
    """Whether the rule gives the same sizes as the writer, at ranks of one digit and of two."""
    # Offsets and ranks are written as digits, so the rule is tested where they get longer.
    for rank in (1, 3, 12):
        ranks = {name: 1 + (rank + (0 if dialect.one_rank else i)) % 12 for name, i in of.items()}
        chosen = [0] * (max(of.values()) + 1)
        for name, i in of.items():
            chosen[i] = ranks[name]
        if rule.size(chosen) != dialect.size(plan.at(ranks)):
            return False
    return True


def layout_size(form: FileLayout, plan: TruncationPlan, dialect: Dialect) -> Size:
    """A function from an adapter of the plan to the bytes of its file, much faster than its writer."""
    first = {item: name for name, item in reversed(rank_groups(plan, dialect).items())}
    names = [first[item] for item in range(len(first))]
    return lambda adapter: form.size([adapter[name].rank for name in names])


@final
@dataclass(frozen=True, slots=True)
class Stop:
    """One stop of a slider.

    Attributes
    ----------
    value : int
        The position of the slider: a rank, or the bytes that the file may have.
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
    for point in sorted(points, key=lambda point: point.rank):
        chosen = plan.ranks(Rule("rank", point.rank), one_rank=dialect.one_rank)
        stops.append(Stop(point.rank, list(chosen.values()), point.uniform.bytes, point.uniform.error))
    return stops


def budget_stops(
    plan: TruncationPlan, dialect: Dialect, points: Sequence[CurvePoint], form: FileLayout | None
) -> list[Stop]:
    """The stops of the slider over file sizes: the ranks that ``loralens compress --size`` chooses.

    Without a `Layout` the writer would have to give the size of every trial, which takes too long. Then the budgets are
    those of the curve, and the ranks are approximately those of the command.
    """
    costs = {name: plan.direction_bytes(plan.adapter[name]) for name in plan.directions}
    of = rank_groups(plan, dialect)
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
