"""The comparison of two checkpoints of one model, tensor by tensor, by keys and shapes; no number is read for it.

Matrices of layers are recognised by keys and shapes alone. ``….weight`` with two or more axes is a linear layer, a
convolution or, according to its name, an embedding. ``….experts.NAME`` with three axes is a stack of experts. Any other
name with two axes is a parameter of its module. The number of groups of a convolution cannot be seen from its shape,
except if every channel has a kernel of its own.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import Layout
from loralens.core.naming.storage import slots
from loralens.core.weights import Weight
from loralens.linalg.factor import Floats

Tensors = Mapping[str, LazyArray]

# A prefix is common to nearly all keys, so a sample of them shows it.
SAMPLES = 64  # keys of one checkpoint that are searched in the other to find a common prefix

_EMBEDDING = re.compile(r"(^|_)(embed|embedding|embeddings|embed_tokens|embed_positions|embed_in)$|^(wte|wpe|shared)$")
_EXPERTS = re.compile(r"experts?\.[^.]+$")
_IN_LAST = re.compile(r"down|w2|wo$")  # expert weights whose outputs have the hidden size


@final
@dataclass(frozen=True, slots=True)
class MatrixDifference:
    """tuned − base of one matrix, computed a block of rows at a time.

    Attributes
    ----------
    base, tuned : Weight
        Weights of the same shape, both in the orientation of ``layout``. Their dtypes may differ.
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
        """Number of rows and columns in the orientation in which both checkpoints store it."""
        rows, columns = self.tuned.stored.shape
        return rows, columns

    def blocks(self) -> Iterator[tuple[slice, Floats, Array]]:
        """Yield blocks of rows as stored: their slice, float64(tuned) − float64(base), and the tuned rows themselves.

        The float64 difference of two numbers of at most 32 bits is exact unless their exponents differ by more than 29.
        """
        for part, ours, theirs in self._both():
            yield part, ours.astype(np.float64) - theirs.astype(np.float64), ours

    def differs(self) -> bool:
        """Whether the tuned weight differs from the base by more than a change of dtype."""
        return any(values_differ(theirs, ours) for _, ours, theirs in self._both())

    def norm(self) -> float:
        """‖tuned − base‖_F, or 0 if only the dtype differs."""
        return sqrt(sum(float(np.vdot(D, D)) for _, D, _ in self.blocks())) if self.differs() else 0.0

    def _both(self) -> Iterator[tuple[slice, Array, Array]]:
        # Both are stored alike, so their blocks have the same rows.
        for (part, ours), (_, theirs) in zip(self.tuned.blocks(), self.base.blocks(), strict=True):
            yield part, ours, theirs


@final
@dataclass(frozen=True, slots=True)
class CheckpointComparison:
    """The comparison of two checkpoints, by the keys of the tuned one.

    Attributes
    ----------
    tuned : mapping of str to LazyArray
        All tensors of the tuned checkpoint.
    matrices : mapping of str to MatrixDifference
        By the name of the module.
    other_tensors : mapping of str to (LazyArray, LazyArray)
        Tensors that are not matrices of layers (norms, biases, buffers): those of the base and of the tuned checkpoint.
    added : tuple of str
        Keys that the base does not have.
    resized : mapping of str to tuple of int
        Keys whose tensor has another shape in the base, and that shape.
    missing : tuple of str
        Keys of the base that the tuned checkpoint does not have.
    edit : str
        How the names of the two differ, in words; empty if they do not.
    """

    tuned: Tensors
    matrices: Mapping[str, MatrixDifference]
    other_tensors: Mapping[str, tuple[LazyArray, LazyArray]]
    added: tuple[str, ...]
    resized: Mapping[str, tuple[int, ...]]
    missing: tuple[str, ...]
    edit: str


def is_embedding(name: str) -> bool:
    """Whether a module is an embedding according to its name."""
    return bool(_EMBEDDING.search(name.rpartition(".")[2]))


def is_depthwise(shape: tuple[int, ...]) -> bool:
    """Whether a shape is that of a depthwise convolution, in which every channel has a kernel of its own."""
    return len(shape) > 2 and shape[1] == 1 < shape[0]


def may_be_grouped(difference: MatrixDifference) -> bool:
    """Whether a convolution may have groups, in which case PEFT would need an A that reads all channels."""
    kernel = prod(difference.layout.kernel)
    out, inside = difference.shape[0], difference.shape[1] // max(kernel, 1)
    return difference.layout.kind == "conv" and kernel > 1 and 1 < inside < out and not out % inside


def compare_checkpoints(
    base: Tensors, tuned: Tensors, *, conv1d: bool = False, hidden: int | None = None
) -> CheckpointComparison:
    """Compare two checkpoints by keys and shapes; no number is read.

    Parameters
    ----------
    base, tuned : mapping of str to LazyArray
        Their keys may differ by a prefix (``bert.encoder…`` and ``encoder…``).
    conv1d : bool
        Whether linear weights are stored as (in, out).
    hidden : int or None
        The hidden size, which shows the orientation of stacks of experts. Without it they are (expert, out, in).
    """
    partners, edit = _match_keys(base, tuned)
    holders = _modules_with_children({key.rpartition(".")[0] for key in tuned})
    matrices: dict[str, MatrixDifference] = {}
    other_tensors: dict[str, tuple[LazyArray, LazyArray]] = {}
    resized: dict[str, tuple[int, ...]] = {}
    for key, partner in partners.items():
        ours, theirs = tuned[key], base[partner]
        if ours.shape != theirs.shape:
            resized[key] = theirs.shape
            continue
        # A parameter of a module that contains other modules gets no pair (see `_matrices`).
        alone = "." in key and key.rpartition(".")[0] not in holders
        differences = _matrices(key, partner, ours, theirs, conv1d=conv1d, hidden=hidden, alone=alone)
        matrices.update(differences)
        if not differences:
            other_tensors[key] = theirs, ours
    added = tuple(key for key in tuned if key not in partners)
    used = {*partners.values()}
    return CheckpointComparison(
        tuned, matrices, other_tensors, added, resized, tuple(key for key in base if key not in used), edit
    )


def _modules_with_children(modules: Iterable[str]) -> set[str]:
    """The modules that contain other modules.

    They are searched in sorted order, since a set of all parents would take memory quadratic in the length of a name.
    """
    ordered = sorted(modules)
    has_children = {}
    for module in ordered:
        # In sorted order everything below a module directly follows `module.`.
        within = bisect_left(ordered, f"{module}.")
        has_children[module] = within < len(ordered) and ordered[within].startswith(f"{module}.")
    return {module for module, holds in has_children.items() if holds and module}


def _match_keys(base: Tensors, tuned: Tensors) -> tuple[dict[str, str], str]:
    """Keys of the tuned checkpoint → keys of the base, with the prefix that matches most, and the edit in words."""

    def edits() -> Iterator[tuple[dict[str, str], str]]:
        yield {key: key for key in tuned if key in base}, ""
        for lead in _prefixes(base, tuned):
            yield {lead + key: key for key in base if lead + key in tuned}, f"adding {lead!r} to the names of the base"
        for lead in _prefixes(tuned, base):
            pairs = {key: lead + key for key in tuned if lead + key in base}
            yield pairs, f"dropping {lead!r} from the names of the base"

    # `max` returns the first of several: on a tie the names stay as they are.
    best, edit = max(edits(), key=lambda option: len(option[0]))
    return {key: best[key] for key in tuned if key in best}, edit


def _prefixes(short: Tensors, long: Tensors) -> list[str]:
    """The prefixes with which keys of ``short`` occur in ``long``."""
    step = max(1, len(short) // SAMPLES)
    tails = [f".{key}" for key in list(short)[::step]]
    return sorted({key[: 1 - len(tail)] for key in long for tail in tails if key.endswith(tail)})


def _matrices(
    key: str, partner: str, ours: LazyArray, theirs: LazyArray, *, conv1d: bool, hidden: int | None, alone: bool
) -> dict[str, MatrixDifference]:
    """The modules whose matrices a tensor holds: one module, the experts of a stack, or none.

    A parameter without a layer of its own is used only if it is ``alone``. PEFT wraps the module that holds the
    parameter, which would change the names of other modules within it.
    """
    shape = ours.shape
    if len(shape) < 2 or not _is_floating(ours) or not _is_floating(theirs) or not prod(shape):
        return {}
    name = key.removesuffix(".weight")
    if len(shape) == 3 and (_EXPERTS.search(key) if name == key else ".experts." in slots(name)[0].name):
        return _expert_matrices(key, partner, ours, theirs, hidden)
    # Without `.weight` it is a parameter, whose orientation is unknown, so it is taken as it is stored.
    if name == key:
        bare = len(shape) == 2 and alone
        layout = Layout("parameter")
        return {key: MatrixDifference(Weight(partner, theirs, False), Weight(key, ours, False), layout)} if bare else {}
    if len(shape) > 2:
        # A pair would mix the channels.
        if is_depthwise(shape):
            return {}
        layout, transposed = Layout("conv", kernel=shape[2:]), False
    elif is_embedding(name):
        layout, transposed = Layout("embedding"), True
    else:
        layout, transposed = Layout("linear", transposed=conv1d), conv1d
    flat = shape[0], prod(shape[1:])
    before, after = (Weight(k, t.reshape(*flat), transposed) for k, t in ((partner, theirs), (key, ours)))
    return {name: MatrixDifference(before, after, layout)}


def _expert_matrices(
    key: str, partner: str, ours: LazyArray, theirs: LazyArray, hidden: int | None
) -> dict[str, MatrixDifference]:
    """The matrices of a stack, one for each expert."""
    count, rows, columns = ours.shape
    name = key.removesuffix(".weight")
    # Granite's layers have names of their own, which `slots` translates.
    called = slots(name)[0].name if name != key else key
    inner = bool(_IN_LAST.search(called.rpartition(".")[2]))
    # The axis with the hidden size shows the orientation. Square experts look the same in both orientations, and are
    # taken as (out, in).
    transposed = rows != columns and (columns if inner else rows) == hidden

    def expert_weight(tensor: LazyArray, e: int) -> LazyArray:
        return tensor.rows(e, e + 1).reshape(rows, columns)

    return {
        f"{name}[{e}]": MatrixDifference(
            Weight(partner, expert_weight(theirs, e), transposed),
            Weight(key, expert_weight(ours, e), transposed),
            Layout("experts"),
        )
        for e in range(count)
    }


def _is_floating(tensor: LazyArray) -> bool:
    return tensor.dtype.kind in "fV"


def values_differ(base: Array, tuned: Array) -> bool:
    """Whether numbers differ by more than a change of dtype; NaN counts as equal to NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        # A tuned checkpoint is often saved in another dtype, which alone does not count as a change.
        cast = base.astype(tuned.dtype)
        return not bool(np.all((cast == tuned) | ((cast != cast) & (tuned != tuned))))
