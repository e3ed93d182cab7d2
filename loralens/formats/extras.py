"""What is not half of a pair, on its way into another dialect: translated, or refused by name."""

from collections.abc import Collection, Mapping

from loralens.core.adapter import Adapter, Extra
from loralens.core.carried import NORMS
from loralens.core.lazy import LazyArray
from loralens.core.names import some
from loralens.core.structured import Update
from loralens.errors import FormatError, ShapeError
from loralens.formats.pairs import SAVE_AGAIN


def to_translate(adapter: Adapter, held: Collection[str], title: str) -> Mapping[str, Extra]:
    """The extras of an adapter from another dialect, all of roles that ``title`` can hold.

    Raises
    ------
    FormatError
        It has extras of other roles; they are named, and never dropped silently.
    """
    norms = [extra.module for extra in adapter.extra.values() if extra.role in NORMS]
    if norms:
        raise FormatError(
            f"the magnitudes of {len(norms)} DoRA modules are not in the file, {norms[0]} the first, and {title} does "
            "not make them from the base",
            fix="give --base, and they are written as the lengths of its weights; or merge it into the base",
        )
    lost = [f"{key} ({extra.role})" for key, extra in adapter.extra.items() if extra.role not in held]
    if lost:
        raise FormatError(f"{title} has no place for {some(lost)}", fix="convert with --drop-extra to leave them out")
    return adapter.extra


def owner(adapter: Adapter, extra: Extra) -> Update:
    """The module that an extra belongs to.

    Raises
    ------
    FormatError
        The adapter does not have it.
    """
    if extra.module not in adapter:
        raise FormatError("its module is not there", fix="convert with --drop-extra to leave it out")
    return adapter.modules[extra.module]


def check_size(tensor: LazyArray, channels: int) -> None:
    """Refuse a tensor that does not hold one number for each channel of a weight."""
    if tensor.size != channels:
        raise ShapeError(f"{tensor.shape} is not one number a channel, of {channels}", fix=SAVE_AGAIN)


def add(tensors: dict[str, LazyArray], more: Mapping[str, LazyArray]) -> None:
    """Put more tensors to those of a file; two of one key are refused."""
    for key, tensor in more.items():
        if key in tensors:
            raise FormatError(f"{key} would be written twice", fix="leave one of the two out")
        tensors[key] = tensor
