"""What is not half of a pair, on its way into another dialect: translated, or refused by name."""

from collections.abc import Collection, Mapping

from loralens.core.adapter import Adapter, Extra
from loralens.core.names import some
from loralens.errors import FormatError


def to_translate(adapter: Adapter, held: Collection[str], title: str) -> Mapping[str, Extra]:
    """The extras of an adapter from another dialect, all of roles that ``title`` can hold.

    Raises
    ------
    FormatError
        It has extras of other roles; they are named, and never dropped silently.
    """
    lost = [f"{key} ({extra.role})" for key, extra in adapter.extra.items() if extra.role not in held]
    if lost:
        raise FormatError(f"{title} has no place for {some(lost)}", fix="convert with --drop-extra to leave them out")
    return adapter.extra
