"""Differences: what two checkpoints of one model hold differently, tensor by tensor, before a number is read.

Matrices of layers are told from everything else by keys and shapes alone: ``….weight`` with two axes or more is a
linear layer, a convolution or, by its name, an embedding; ``….experts.NAME`` with three axes is a stack of experts; any
other name with two axes is a parameter of its module. How many groups a convolution has, shapes do not tell: only where
every channel has its own is it seen.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import Layout
from loralens.core.naming.storage import slots
from loralens.core.weights import Weight
from loralens.linalg.factor import Floats

Tensors = Mapping[str, LazyArray]

SAMPLES = 64  # keys of one checkpoint that are looked for in the other to see how their names differ

_EMBEDDING = re.compile(r"(^|_)(embed|embedding|embeddings|embed_tokens|embed_positions|embed_in)$|^(wte|wpe|shared)$")
_EXPERTS = re.compile(r"experts?\.[^.]+$")
_IN_LAST = re.compile(r"down|w2|wo$")  # expert weights that lead back to the hidden size


@final
@dataclass(frozen=True, slots=True)
class Difference:
    """tuned − base of one matrix, made some rows at a time.

    Attributes
    ----------
    base, tuned : Weight
        Of one shape, both in the orientation that ``layout`` says; their dtypes may differ.
    layout : Layout
    """

    base: Weight
    tuned: Weight
    layout: Layout

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""
        return self.tuned.shape

    @property
    def stored(self) -> tuple[int, int]:
        """Rows and columns as both checkpoints store it."""
        rows, columns = self.tuned.stored.shape
        return rows, columns

    def blocks(self) -> Iterator[tuple[slice, Floats, Array]]:
        """Some rows as stored: their slice, float64(tuned) − float64(base), and those of tuned in its own dtype.

        The float64 difference of two numbers of at most 32 bits is exact unless their exponents differ by more than 29.
        """
        for part, ours, theirs in self._both():
            yield part, ours.astype(np.float64) - theirs.astype(np.float64), ours

    def differs(self) -> bool:
        """Whether the tuned weight is more than the base in another dtype."""
        return any(_differ(theirs, ours) for _, ours, theirs in self._both())

    def _both(self) -> Iterator[tuple[slice, Array, Array]]:
        for (part, ours), (_, theirs) in zip(self.tuned.blocks(), self.base.blocks(), strict=True):
            yield part, ours, theirs


@final
@dataclass(frozen=True, slots=True)
class Other:
    """A tensor of both checkpoints that is the matrix of no layer: a norm, a bias, a table of numbers."""

    base: LazyArray
    tuned: LazyArray

    def differs(self) -> bool:
        """Whether any number is another than that of the base in the dtype of the tuned tensor."""
        return _differ(self.base.read(), self.tuned.read())


@final
@dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints beside each other, by the keys of the tuned one.

    Attributes
    ----------
    tuned : mapping of str to LazyArray
        All of it.
    matrices : mapping of str to Difference
        By the name of the module.
    others : mapping of str to Other
        By key.
    added : tuple of str
        Keys that the base has not.
    resized : mapping of str to tuple of int
        Keys under which the base has another shape, and that shape.
    missing : tuple of str
        Keys of the base that the tuned checkpoint has not.
    edit : str
        How the names of the two differ, in words; empty where they do not.
    """

    tuned: Tensors
    matrices: Mapping[str, Difference]
    others: Mapping[str, Other]
    added: tuple[str, ...]
    resized: Mapping[str, tuple[int, ...]]
    missing: tuple[str, ...]
    edit: str


def is_embedding(name: str) -> bool:
    """Whether the name of a module says that it is an embedding."""
    return bool(_EMBEDDING.search(name.rpartition(".")[2]))


def is_depthwise(shape: tuple[int, ...]) -> bool:
    """Whether this is the weight of a convolution in which every channel has a kernel of its own."""
    return len(shape) > 2 and shape[1] == 1 < shape[0]


def perhaps_grouped(difference: Difference) -> bool:
    """Whether a convolution may be one in groups: PEFT would want an A that reads all channels."""
    kernel = prod(difference.layout.kernel)
    out, inside = difference.shape[0], difference.shape[1] // max(kernel, 1)
    return difference.layout.kind == "conv" and kernel > 1 and 1 < inside < out and not out % inside


def compare(base: Tensors, tuned: Tensors, *, conv1d: bool = False, hidden: int | None = None) -> Comparison:
    """Two checkpoints beside each other; no number is read.

    Parameters
    ----------
    base, tuned : mapping of str to LazyArray
        Their keys may differ by a prefix (``bert.encoder…`` and ``encoder…``).
    conv1d : bool
        Linear weights are stored (in, out).
    hidden : int or None
        The hidden size, which tells how stacks of experts are stored; as (expert, out, in) where it does not.
    """
    partners, edit = _partners(base, tuned)
    holders = _holders({key.rpartition(".")[0] for key in tuned})
    matrices: dict[str, Difference] = {}
    others: dict[str, Other] = {}
    resized: dict[str, tuple[int, ...]] = {}
    for key, partner in partners.items():
        ours, theirs = tuned[key], base[partner]
        if ours.shape != theirs.shape:
            resized[key] = theirs.shape
            continue
        alone = "." in key and key.rpartition(".")[0] not in holders
        found = _matrices(key, partner, ours, theirs, conv1d=conv1d, hidden=hidden, alone=alone)
        matrices.update(found)
        if not found:
            others[key] = Other(theirs, ours)
    added = tuple(key for key in tuned if key not in partners)
    used = {*partners.values()}
    return Comparison(tuned, matrices, others, added, resized, tuple(key for key in base if key not in used), edit)


def _holders(modules: Iterable[str]) -> set[str]:
    """The modules that others lie within.

    Looked up in sorted order: all that lie above a module are as many letters as the square of its dotted name.
    """
    ordered = sorted(modules)
    held = {}
    for module in ordered:
        within = bisect_left(ordered, f"{module}.")
        held[module] = within < len(ordered) and ordered[within].startswith(f"{module}.")
    return {module for module, holds in held.items() if holds and module}


def _partners(base: Tensors, tuned: Tensors) -> tuple[dict[str, str], str]:
    """Key of the tuned checkpoint → that of the base, under the one prefix that finds most."""
    best = {key: key for key in tuned if key in base}
    edit = ""
    for lead in _leads(base, tuned):
        found = {lead + key: key for key in base if lead + key in tuned}
        if len(found) > len(best):
            best, edit = found, f"adding {lead!r} to the names of the base"
    for lead in _leads(tuned, base):
        found = {key: lead + key for key in tuned if lead + key in base}
        if len(found) > len(best):
            best, edit = found, f"dropping {lead!r} from the names of the base"
    return {key: best[key] for key in tuned if key in best}, edit


def _leads(short: Tensors, long: Tensors) -> list[str]:
    """Prefixes that keys of ``short`` have in ``long``."""
    step = max(1, len(short) // SAMPLES)
    tails = [f".{key}" for key in list(short)[::step]]
    return sorted({key[: 1 - len(tail)] for key in long for tail in tails if key.endswith(tail)})


def _matrices(
    key: str, partner: str, ours: LazyArray, theirs: LazyArray, *, conv1d: bool, hidden: int | None, alone: bool
) -> dict[str, Difference]:
    """The modules whose matrices a tensor holds: one, the experts of a stack, or none.

    A parameter without a layer of its own is taken where it stands ``alone``: PEFT wraps the module that holds it, and
    calls what lies within that module otherwise then.
    """
    shape = ours.shape
    if len(shape) < 2 or not _floats(ours) or not _floats(theirs) or not prod(shape):
        return {}
    name = key.removesuffix(".weight")
    if len(shape) == 3 and (_EXPERTS.search(key) if name == key else ".experts." in slots(name)[0].name):
        return _experts(key, partner, ours, theirs, hidden)
    if name == key:
        bare = len(shape) == 2 and alone
        layout = Layout("parameter")
        return {key: Difference(Weight(partner, theirs, False), Weight(key, ours, False), layout)} if bare else {}
    if len(shape) > 2:
        if is_depthwise(shape):
            return {}  # a pair would mix the channels
        layout, transposed = Layout("conv", kernel=shape[2:]), False
    elif is_embedding(name):
        layout, transposed = Layout("embedding"), True
    else:
        layout, transposed = Layout("linear", transposed=conv1d), conv1d
    flat = shape[0], prod(shape[1:])
    before, after = (Weight(k, t.reshape(*flat), transposed) for k, t in ((partner, theirs), (key, ours)))
    return {name: Difference(before, after, layout)}


def _experts(key: str, partner: str, ours: LazyArray, theirs: LazyArray, hidden: int | None) -> dict[str, Difference]:
    """The matrices of a stack, one an expert."""
    count, rows, columns = ours.shape
    name = key.removesuffix(".weight")
    called = slots(name)[0].name if name != key else key  # Granite's layers have names of their own
    inner = bool(_IN_LAST.search(called.rpartition(".")[2]))  # then the hidden size is that of the outputs
    transposed = rows != columns and (columns if inner else rows) == hidden

    def one(tensor: LazyArray, e: int) -> LazyArray:
        return tensor.rows(e, e + 1).reshape(rows, columns)

    return {
        f"{name}[{e}]": Difference(
            Weight(partner, one(theirs, e), transposed), Weight(key, one(ours, e), transposed), Layout("experts")
        )
        for e in range(count)
    }


def _floats(tensor: LazyArray) -> bool:
    return tensor.dtype.kind in "fV"


def _differ(base: Array, tuned: Array) -> bool:
    """Whether numbers differ by more than a change of dtype; NaN is NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = base.astype(tuned.dtype)
        return not bool(np.all((cast == tuned) | ((cast != cast) & (tuned != tuned))))
