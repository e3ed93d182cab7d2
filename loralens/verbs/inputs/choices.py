"""Options that take one of several values."""

from collections.abc import Iterable

from loralens.errors import OptionError


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Refuse a value that is not among those that an option allows.

    Raises
    ------
    OptionError
        It names the values that are allowed.
    """
    values = list(allowed)
    if value not in values:
        raise OptionError(f"{name}={value!r} is not a value of this option", fix=f"give one of {', '.join(values)}")
