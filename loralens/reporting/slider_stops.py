"""The stops of the sliders of a page, and the size of an adapter file at any ranks.

Every stop is computed here, with the rules by which `loralens compress` chooses ranks; the page only shows it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, NamedTuple, final

import numpy as np

from loralens.compression.curve import CurvePoint
from loralens.compression.loss import total_error
from loralens.compression.plan import TruncationPlan, is_fused_module
from loralens.core.adapter import Adapter
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.ranks import Rule, rank_items, ranks_from_items, shared_ranks
from loralens.core.structured import Structured, Update
from loralens.errors import LoraLensError
from loralens.formats.dialects.sizes import stored_size
from loralens.formats.files.container import DTYPE_NAMES, Files, Stored
from loralens.formats.files.safetensors_header import by_width
from loralens.linalg.factor import Integers

# The number of stops of the slider over sizes, in steps of 3 % of its range. For every stop all ranks are chosen anew,
# and the page stores them.
STOPS = 32

# Every choice under a budget takes some rounds, and every round looks at all directions of all modules.
MANY = 5_000  # modules above which the ranks and sizes of the slider over sizes are approximate
# With more groups of modules than this, `_matches_writer` makes one trial.
GROUPS = 200
POWERS = 10 ** np.arange(1, 19, dtype=np.int64)  # the smallest numbers of two digits and more
RANKS = (1, 3, 12)  # the ranks of its trials, of one digit and of two

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
class TensorSize:
    """One stored tensor of a file, whose size grows with the rank of one group of modules, or not at all.

    Attributes
    ----------
    entry : int
        Bytes of its entry in the header, without the digits of rank and offsets.
    unit : int
        Its bytes at rank 1. If no dimension is a rank, these are its bytes at every rank.
    module : str or None
        The first module of the group whose rank is one of its dimensions; None where no dimension is a rank.
    """

    entry: int
    unit: int
    module: str | None


# Without slots: the cached arrays are kept in the dictionary of the object.
@final
@dataclass(frozen=True)
class FileLayout:
    """What determines the size of a safetensors file at any ranks.

    These are the bytes of the header outside of its entries (``head``), and the tensors in the order of the file.
    The writer gives the same size, but it would make an adapter and a header for every choice of ranks that is tried.
    """

    head: int
    tensors: Sequence[TensorSize]

    @cached_property
    def _modules(self) -> list[str]:
        """The modules whose ranks matter, each once."""
        return list(dict.fromkeys(tensor.module for tensor in self.tensors if tensor.module))

    @cached_property
    def _arrays(self) -> tuple[Integers, Integers, int]:
        """Of every tensor its bytes at rank 1, and the place of its module (or the last); the bytes of all entries."""
        places = {name: i for i, name in enumerate(self._modules)}
        units = np.array([tensor.unit for tensor in self.tensors], dtype=np.int64)
        owners = np.array([places[x.module] if x.module else len(places) for x in self.tensors], dtype=np.int64)
        return units, owners, sum(tensor.entry for tensor in self.tensors)

    def size(self, ranks: Mapping[str, int]) -> int:
        """Bytes of the file at these ranks of modules."""
        units, owners, entries = self._arrays
        own = np.array([ranks[name] for name in self._modules], dtype=np.int64)
        ends = np.cumsum(units * np.append(own, 1)[owners])
        total = int(ends[-1]) if ends.size else 0
        # Offsets and ranks stand in the header as decimal digits, so its length depends on them. A tensor begins where
        # the one before it ends.
        offsets = 2 * int(_digits(ends).sum()) - len(str(total)) + 1 if ends.size else 0
        length = self.head + entries + offsets + int(np.append(_digits(own), 0)[owners].sum())
        return 8 + length + -length % 8 + total  # the header: 8 bytes for its length, then padded to a multiple of 8


def _digits(numbers: Integers) -> Integers:
    """The number of decimal digits of every number from 0."""
    return np.searchsorted(POWERS, numbers, side="right").astype(np.int64) + 1


class _LayoutError(Exception):
    """The sizes of the files follow no formula of this form."""


def rank_groups(plan: TruncationPlan, dialect: Dialect) -> dict[str, int]:
    """Module name → the number of its group: modules that must have the same rank form one."""
    shared = shared_ranks(plan.adapter.modules)
    numbers: dict[str, int] = {}
    return {
        name: 0 if dialect.one_rank else numbers.setdefault(shared.get(name, name), len(numbers))
        for name in plan.directions
    }


def find_layout(plan: TruncationPlan, dialect: Dialect) -> FileLayout | None:
    """The formula for the size of the file at any ranks; None if there is none, as for a file that is not safetensors.

    The writer itself shows which tensor grows with the rank of which group: it gets factors without numbers in which
    every group has a rank of its own, larger than any other dimension.
    """
    # At full rank a fused or structured module is stored in its own form, whose size does not follow from the rank.
    if any(
        is_fused_module(plan.adapter[name]) or isinstance(plan.adapter[name], Structured) for name in plan.directions
    ):
        return None
    groups = rank_groups(plan, dialect)
    shapes: list[tuple[int, ...]] = [module.shape for module in plan.adapter.modules.values()]
    shapes += [extra.tensor.shape for extra in plan.adapter.extra.values()]
    # Above the number of groups too, so that no multiple of a rank is the rank of another group.
    first = 1 + max(len(groups), *(n for shape in shapes for n in shape))
    try:
        stored, files = dialect.write(_without_numbers(plan, {name: first + i for name, i in groups.items()}))
        if not files.weights.endswith(".safetensors"):
            return None
        layout = _layout(stored, groups, first)
        # Without the tensors of this file, which are freed before another one is made.
        outline = _Outline(list(stored.tensors), stored.metadata)
        del stored
        return layout if _matches_writer(layout, outline, plan, dialect, groups) else None
    except (LoraLensError, _LayoutError):  # the dialect cannot hold such ranks, or its files follow another formula
        return None


class _Outline(NamedTuple):
    """The keys and the metadata of a file."""

    keys: Sequence[str]
    metadata: Mapping[str, str] | None


def _without_numbers(plan: TruncationPlan, ranks: Mapping[str, int]) -> Adapter:
    """The adapter of the plan with factors of these ranks, whose numbers are all 0."""

    def stub(module: Update, rank: int) -> LowRank:
        (out, in_), (B, A) = module.shape, module.factors
        return LowRank(
            _zeros(plan.dtype or B.dtype, (out, rank)),
            _zeros(plan.dtype or A.dtype, (rank, in_)),
            module.scale,
            scaling=module.scaling,
            layout=module.layout,
        )

    modules = {name: stub(plan.adapter[name], rank) for name, rank in ranks.items()}
    return replace(plan.adapter, modules={**plan.adapter.modules, **modules})


def _zeros(dtype: np.dtype[Any], shape: tuple[int, ...]) -> LazyArray:
    # The array itself would take more memory than the module.
    return LazyArray(lambda: np.broadcast_to(np.zeros((), dtype), shape), shape=shape, dtype=dtype)


def _layout(stored: Stored, groups: Mapping[str, int], first: int) -> FileLayout:
    """The layout of a file in which the rank of a group is its number plus ``first``."""
    modules = {group: name for name, group in reversed(list(groups.items()))}
    tensors = []
    for key, tensor in by_width(stored.tensors.items):
        grown = [i for i, n in enumerate(tensor.shape) if n >= first]
        # A tensor of r × r numbers does not grow in proportion to r, and the digits of a multiple of r are not its own.
        if len(grown) > 1 or any(tensor.shape[i] - first not in modules for i in grown):
            raise _LayoutError
        # The entry with its comma, without the digits of the rank and of the offsets.
        dimensions = ",".join("" if i in grown else str(n) for i, n in enumerate(tensor.shape))
        dtype = DTYPE_NAMES[tensor.dtype]
        entry = f'{_json_text(key)}:{{"dtype":"{dtype}","shape":[{dimensions}],"data_offsets":[,]}},'
        unit = tensor.dtype.itemsize * prod(n for i, n in enumerate(tensor.shape) if i not in grown)
        module = modules[tensor.shape[grown[0]] - first] if grown else None
        tensors.append(TensorSize(len(entry.encode()), unit, module))
    metadata = "" if stored.metadata is None else f'"__metadata__":{_json_text(dict(stored.metadata))},'
    return FileLayout(len(metadata.encode()) + 2 - 1, tensors)  # two braces, and no comma after the last entry


def _json_text(value: Any) -> str:
    # As `loralens.formats.files.container` writes headers: without spaces, and with letters beyond ASCII as they are.
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _matches_writer(
    layout: FileLayout, outline: _Outline, plan: TruncationPlan, dialect: Dialect, groups: Mapping[str, int]
) -> bool:
    """Whether the formula gives the same sizes as the writer, at ranks of one digit and of two."""
    # Offsets and ranks are written as digits, so the formula is tested at ranks where they get longer. Any 12
    # successive groups have different ranks here, so that a tensor in the wrong group changes the size. Of very many
    # groups all get one rank, because a configuration that names the rank of each takes three times as long.
    trials = [{name: 1 + (rank + (0 if dialect.one_rank else i)) % 12 for name, i in groups.items()} for rank in RANKS]
    # The metadata may name a rank only if all modules have the same.
    uniform = [dict.fromkeys(groups, rank) for rank in RANKS]
    for ranks in [*trials, *uniform] if len(groups) <= GROUPS else uniform[-1:]:
        # The modules that keep their rank stay as they are, as in `plan.at`; of the others only the shapes matter.
        changed = {name: rank for name, rank in ranks.items() if rank != plan.adapter[name].rank}
        trial, files = dialect.write(_without_numbers(plan, changed))
        # Metadata that names ranks, as those of diffusers and kohya do, would have another length at every choice.
        if trial.metadata != outline.metadata or list(trial.tensors) != outline.keys:
            return False
        if layout.size(ranks) != stored_size(trial, files):
            return False
    return True


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
    choose = plan.chooser("rank", one_rank=dialect.one_rank)
    for point in reversed(points):
        chosen = choose(Rule("rank", point.rank))
        stops.append(Stop(point.rank, list(chosen.values()), point.uniform.bytes, point.uniform.error))
    return stops


def budget_stops(
    plan: TruncationPlan, dialect: Dialect, points: Sequence[CurvePoint], layout: FileLayout | None
) -> list[Stop]:
    """The stops of the slider over file sizes: the ranks that ``loralens compress --size`` chooses.

    Without a `FileLayout` the writer would have to give the size of every trial, which takes too long, as do the trials
    of very many modules. Then the budgets are those of the curve, and the ranks are approximately those of the command.
    """
    costs = {name: plan.direction_bytes(plan.adapter[name]) for name in plan.directions}
    spectra = {name: directions.s for name, directions in plan.directions.items()}
    items = rank_items(
        spectra,
        costs,
        shared=shared_ranks(plan.adapter.modules),
        least=plan.least(drop_dead=False),
        one_rank=dialect.one_rank,
        widths={name: plan.adapter[name].rank for name in plan.directions},
    )

    def choose(budget: int, size: Callable[[Mapping[str, int]], int] | None) -> dict[str, int]:
        # `plan.ranks` is not used here, as it makes a whole adapter for every choice that it tries.
        return ranks_from_items(items, Rule("bytes", budget), spectra, one_rank=dialect.one_rank, size=size)

    # The key is the budget, so that points of equal size become one stop.
    stops: dict[int, Stop] = {}
    if layout is None:
        for uniform, point in zip(rank_stops(plan, dialect, points), reversed(points), strict=True):
            factors = sum(cost * rank for cost, rank in zip(costs.values(), uniform.ranks, strict=True))
            cheapest = list(choose(factors, None).values())
            stops[point.budget.bytes] = Stop(point.budget.bytes, cheapest, point.budget.bytes, point.budget.error)
        return [stops[size] for size in sorted(stops)]
    low, high = (edge(point.uniform.bytes for point in points) for edge in (min, max))
    for k in range(STOPS):
        budget = low + round((high - low) * k / (STOPS - 1))
        chosen = choose(budget, layout.size)
        stops[budget] = Stop(budget, list(chosen.values()), layout.size(chosen), total_error(plan.losses(chosen)))
    return list(stops.values())
