"""Grouping the modules of an adapter by the stored pair that holds them, such as the experts of one weight."""

from collections.abc import Mapping

from loralens.core.adapter import Adapter
from loralens.core.names import expert, weight_name
from loralens.core.structured import Update
from loralens.errors import ShapeError

Stacks = Mapping[str, Mapping[str, Update]]


def group_by_pair(adapter: Adapter) -> Stacks:
    """Modules by the name of the weight that they adapt; the experts of a stack are in one group, in their order."""
    stacks: dict[str, dict[str, Update]] = {}
    for name, module in adapter.items():
        stacks.setdefault(weight_name(name) if module.layout.kind == "experts" else name, {})[name] = module
    return stacks


def is_as_read(modules: Mapping[str, Update], form: str) -> bool:
    """Whether all modules of a stored pair of the dialect ``form`` are there and unchanged, apart from their scales."""
    origins = [module.origin for module in modules.values()]
    first = origins[0]
    # One shared origin and as many modules as it had: nothing was removed, and nothing was changed.
    return (
        first is not None
        and first.format == form
        and first.share == len(modules)
        and all(origin == first for origin in origins)
    )


def check_complete(modules: Mapping[str, Update], holder: str) -> None:
    """Refuse a stack whose experts do not fit into one pair of tensors.

    Raises
    ------
    ShapeError
        The experts differ in shape, rank or dtype, or some are missing.
    """
    kinds = {(m.shape, m.rank, *(factor.dtype for factor in m.factors)) for m in modules.values()}
    if len(kinds) > 1:
        raise ShapeError(
            f"the experts of this stack differ in rank or dtype, and {holder} holds one for all",
            fix="give them one rank (--uniform)",
        )
    # They must be 0, 1, 2 … in order, and as many as the file that they came from had.
    numbers = [found.number for found in map(expert, modules) if found]
    shares = {module.origin.share for module in modules.values() if module.origin}
    if numbers != list(range(len(modules))) or shares - {len(modules)}:
        raise ShapeError(
            f"some experts of this stack are missing, and {holder} holds all", fix="keep all of them, or none"
        )
