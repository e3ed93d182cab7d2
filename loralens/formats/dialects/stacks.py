"""Grouping the modules of an adapter by the stored pair that holds them, such as the experts of one weight."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import LazyArray
from loralens.core.names import expert, weight_name
from loralens.core.structured import Update
from loralens.errors import ShapeError

Stacks = Mapping[str, Mapping[str, Update]]
Value = TypeVar("Value")


def group_by_pair(adapter: Adapter) -> Stacks:
    """Modules by the name of the weight that they adapt; the experts of a stack are in one group, in their order."""
    stacks: dict[str, dict[str, Update]] = {}
    for name, module in adapter.items():
        stacks.setdefault(weight_name(name) if module.layout.kind == "experts" else name, {})[name] = module
    return stacks


def is_as_read(modules: Collection[Update], form: str) -> bool:
    """Whether all modules of a stored pair of the dialect ``form`` are there and unchanged, apart from their scales."""
    first, *origins = (module.origin for module in modules)
    # One shared origin and as many modules as it had: nothing was removed, and nothing was changed.
    unchanged = first is not None and first.format == form and first.share == len(modules)
    return unchanged and all(origin == first for origin in origins)


def most_common(values: Iterable[Value], default: Value) -> Value:
    """The value that occurs most often; ``default`` if there are none."""
    counts = Counter(values)
    return counts.most_common(1)[0][0] if counts else default


def stack_matrices(matrices: Sequence[LazyArray]) -> LazyArray:
    """Matrices of one shape as one array (E, m, n), in their dtype, or in float32 if their dtypes differ."""
    dtypes = {matrix.dtype for matrix in matrices}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    shape = (len(matrices), *matrices[0].shape)
    return LazyArray(lambda: np.stack([m.read().astype(dtype) for m in matrices]), shape=shape, dtype=dtype)


def check_complete(modules: Mapping[str, Update], holder: str) -> None:
    """Refuse a stack whose experts do not fit into one pair of tensors.

    Raises
    ------
    ShapeError
        The experts differ in shape, rank or dtype, or some are missing.
    """
    kinds = {(m.shape, m.rank, *(factor.dtype for factor in m.factors)) for m in modules.values()}
    if len(kinds) > 1:
        what = f"the experts of this stack differ in rank or dtype, but {holder} holds one for all"
        raise ShapeError(what, fix="give them one rank (--uniform)")
    # The numbers must be 0, 1, 2 … in order, and as many as in the file that the experts came from.
    numbers = [found.number for found in map(expert, modules) if found]
    shares = {module.origin.share for module in modules.values() if module.origin}
    if numbers != list(range(len(modules))) or shares - {len(modules)}:
        what = f"some experts of this stack are missing, but {holder} holds all"
        raise ShapeError(what, fix="keep all of them, or none")
